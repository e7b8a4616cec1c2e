"""Policies that keep all tokens and choose what is read, against NumPy: outputs of each step, and so the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.caches import read_cache
from layers.mixer import MixerState
from layers.mixers.attention.attention import Attention
from layers.parts.attention_config import AttentionConfig
from tests.layers.caches import literal, literal_selection
from tests.layers.caches.reading import (
    GROUPS,
    HEADS,
    LENGTHS,
    PROMPT,
    STEPS,
    WIDTH,
    given,
    ids,
    inputs,
    layer,
    output,
    positions,
    projected,
    read_prompt,
    run,
    tokens,
)

EACH = HEADS // GROUPS


def check(policy, read, atol=1e-5):
    """Raises unless each step reads the tokens that `read(q, k, v, length)` gives, per step and query head."""
    _, outputs, *_ = given(policy, calls=2)
    plain = []
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        steps = read(q, k, v, length)
        for step in range(STEPS):
            now, o = length + step, np.zeros((HEADS, v.shape[2]))
            for head, read_ in enumerate(steps[step]):
                part = (k[read_, head // EACH], v[read_, head // EACH])
                o[head] = literal.joined([(q[now, head], *part)], q.shape[2] ** -0.5)
            np.testing.assert_allclose(outputs[row, step], output(o), atol=atol)
            plain.append(any(len(one) <= now for one in steps[step]))
    assert any(plain)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 3])
def test_recycled(stride):
    policy = read_cache(f"recycled(budget=5, stride={stride})")

    def read(q, k, v, length):
        steps = literal_selection.recycled(policy, q, k, length)
        return [[one[h // EACH] for h in range(HEADS)] for one in steps]

    if stride > 1:
        check(policy, read)
        return
    _, outputs, *_ = given(policy)
    _, whole, *_ = given(read_cache("full"))
    np.testing.assert_allclose(outputs, whole, atol=1e-5)


@pytest.mark.slow
def test_squeezed():
    policy = read_cache("squeezed(sparsity=0.6, clusters=0.4, window=3, iterations=4)")
    check(policy, lambda q, k, v, length: literal_selection.squeezed(policy, q, k, length))


@pytest.mark.slow
def test_longheads():
    policy = read_cache("longheads(budget=9, chunk=3)")
    check(policy, lambda *given: literal_selection.longheads(policy, *given))


@pytest.mark.slow
def test_unlimiformer():
    policy = read_cache("unlimiformer(budget=5)")
    check(policy, lambda q, k, v, length: literal_selection.unlimiformer(policy, q, k, length))


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [1, 3])
def test_lserve(reuse):
    gates = "gates=[[0.9, 0.2]], sparsity=0.5, sinks=1, recent=2"
    policy = read_cache(f"lserve({gates}, budget=8, page=4, logical=2, reuse={reuse})")

    def read(q, k, v, length):
        steps = literal_selection.lserve(policy, q, k, length)
        ends = [[j for j in range(i + 1) if j < 1 or j > i - 2] for i in range(length, length + STEPS)]
        return [[one[0]] * EACH + [end] * EACH for one, end in zip(steps, ends, strict=True)]

    check(policy, read)
    # The prompt is read as by DuoAttention.
    y, *_ = given(policy, calls=3)
    wanted, *_ = given(read_cache(f"duoattention({gates})"), calls=3)
    np.testing.assert_allclose(y, wanted, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["window", "true"])
def test_infllm(distance):
    options = "budget=4, window=5, sinks=1, unit=2, representatives=1"
    policy = read_cache(f"infllm({options}, distance={distance})")
    y, outputs, *_ = given(policy, calls=3)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        for now, (near, far) in enumerate(literal_selection.infllm(policy, q, k)):
            o, one, keys = np.zeros((HEADS, v.shape[2])), q[now : now + 1], k[far]
            if distance == "window":
                one = literal_selection.turned(one, [policy.window - now])
                keys = literal_selection.turned(keys, [-j for j in far])
            for head in range(HEADS):
                g = head // EACH
                parts = [(q[now, head], k[near, g], v[near, g]), (one[0, head], keys[:, g], v[far, g])]
                o[head] = literal.joined(parts, q.shape[2] ** -0.5)
            got = y[row, PROMPT - length + now] if now < length else outputs[row, now - length]
            np.testing.assert_allclose(got, output(o), atol=1e-5)
        assert len(near) + len(far) < now


@pytest.mark.slow
def test_shadowkv():
    policy = read_cache("shadowkv(budget=4, rank=5, chunk=2, outliers=1, local=1)")
    _, outputs, *_ = given(policy, calls=2)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        keys, steps = literal_selection.shadowkv(policy, q, k, length)
        assert np.abs(keys - k).max() > 0.1
        for step in range(STEPS):
            now = length + step
            assert max(map(len, steps[step])) < now
            o, _ = literal.outputs(q[now], keys, v, steps[step])
            np.testing.assert_allclose(outputs[row, step], output(o), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_cskv(bias):
    policy = read_cache("cskv(keys=0.5, values=0.75, window=3)")
    made = layer(bias=True) if bias else layer()
    if bias:
        for number, projection in enumerate((made.key, made.value)):
            projection.bias[...] = jax.random.normal(jax.random.key(number), projection.bias.shape)
    _, outputs, *_ = run(made, jnp.asarray(inputs()), jnp.asarray(ids()), policy, calls=2)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row, made)
        narrow = []
        for x, projection, rank in ((k, made.key, 4), (v, made.value, 6)):
            matrix = np.asarray(projection.kernel[...], np.float64)
            more = np.asarray(projection.bias[...], np.float64) if bias else np.zeros(matrix.shape[1])
            basis = np.linalg.svd(matrix)[2][:rank]
            flat = x if x is v else literal_selection.turned(x, -np.arange(len(x)))
            flat = (flat.reshape(len(x), -1) - more) @ basis.T @ basis + more
            flat = flat.reshape(x.shape)
            narrow.append(flat if x is v else literal_selection.turned(flat, np.arange(len(x))))
        assert np.abs(narrow[0] - k).max() > 0.1
        for step in range(STEPS):
            now, o = length + step, np.zeros((HEADS, v.shape[2]))
            old, new = slice(0, now - 2), slice(now - 2, now + 1)
            for head in range(HEADS):
                g, one = head // EACH, q[now, head]
                parts = [(one, narrow[0][old, g], narrow[1][old, g]), (one, k[new, g], v[new, g])]
                o[head] = literal.joined(parts, len(one) ** -0.5)
            np.testing.assert_allclose(outputs[row, step], output(o, made), atol=2e-5)


@pytest.mark.slow
def test_taskkv():
    policy = read_cache("taskkv(whole=0.5, sinks=1, recent=3, middle=2)")
    _, _, kept, _ = given(policy)
    heads = policy.heads(read_prompt("taskkv(whole=0.5, sinks=1, recent=3, middle=2)"), layer().view())
    # Two heads are equally far from their mean, so that rounding decides.
    assert heads.sum(1).tolist() == [1, 1]
    for row, length in enumerate(LENGTHS):
        q, k, _ = projected(row)
        mass = literal.by_group(literal.causal(q[:length], k[:length])[:, length - 3 :].sum(1), GROUPS)
        wanted = []
        for g in range(GROUPS):
            some = [0, *literal.largest(mass[g], 2, range(1, length - 3)), *range(length - 3, length)]
            wanted.append(list(range(length)) if heads[row, g] else some)
        assert positions(kept.numbers, kept.positions, row) == wanted


@pytest.mark.slow
def test_heads_far_from_the_mean_keep_everything():
    """Four key/value heads with the same values, but for one without any, whose output is the smallest and the farthest from the mean."""
    options = dict(width=WIDTH, heads=4, kv_heads=4, head_dim=4)
    made = Attention(AttentionConfig(**options), rngs=nnx.Rngs(0))
    shared = made.value.kernel[...][:, :4]
    made.value.kernel[...] = jnp.concatenate([shared, shared, 0 * shared, shared], axis=1)
    # All tokens weigh about the same.
    made.query.kernel[...] = made.query.kernel[...] * 1e-3
    policy = read_cache("taskkv(whole=0.2, sinks=1, recent=3, middle=2)")
    state = made.init_state(1, max_length=PROMPT)
    state = MixerState(policy.begin(state.carried, 4, 0), state.place)
    prompt = made(jnp.asarray(tokens(0))[None, :PROMPT], state)[1].carried
    q, k, v = (
        np.asarray(x[0], np.float64)
        for x in made.project(jnp.asarray(tokens(0))[None, :PROMPT], jnp.arange(PROMPT)[None], None)
    )
    means, _ = literal.outputs(q[-1], k, v, [list(range(PROMPT))] * 4)
    distance = np.linalg.norm(means - means.mean(0), axis=1)
    far = literal.largest(distance, 1, range(4))
    assert policy.heads(prompt, made.view())[0].tolist() == [g in far for g in range(4)]
    assert far == [2]
    assert np.linalg.norm(means, axis=1).argmin() == 2
    assert policy.budgets([prompt], [made.view()])[0][0].tolist() == [
        PROMPT if g in far else 6 for g in range(4)
    ]
