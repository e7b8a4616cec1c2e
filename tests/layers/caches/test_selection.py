"""Policies that keep all tokens and choose what is read, against NumPy: outputs of each step, and so the tokens."""

import numpy as np
import pytest

from layers.caches import read_cache
from tests.layers.caches import literal, literal_selection
from tests.layers.caches.reading import GROUPS, HEADS, LENGTHS, PROMPT, STEPS, given, output, projected

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
            for head, tokens in enumerate(steps[step]):
                part = (k[tokens, head // EACH], v[tokens, head // EACH])
                o[head] = literal.joined([(q[now, head], *part)], q.shape[2] ** -0.5)
            np.testing.assert_allclose(outputs[row, step], output(o), atol=atol)
            plain.append(any(len(tokens) <= now for tokens in steps[step]))
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
