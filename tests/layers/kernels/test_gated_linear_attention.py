"""What only `gated_linear_attention` has: chunk borders, strong decay, sharing of heads, the normaliser, pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from layers.kernels.gated_linear_attention import (
    Piece,
    compose,
    gated_linear_attention,
    reference,
    summarize,
    xla,
)

B, T, H, K, V = 2, 45, 2, 4, 3


def draw(time=T, *, heads=H, bonus=False, decay=None, seed=0):
    rng = np.random.default_rng(seed)
    arguments = {name: rng.standard_normal((B, time, heads, K)) for name in "qk"}
    arguments["v"] = rng.standard_normal((B, time, heads, V))
    arguments["initial_state"] = rng.standard_normal((B, heads, K, V))
    if decay is not None:
        arguments["log_decay"] = decay(rng, (B, time, heads))
    if bonus:
        arguments["bonus"] = rng.standard_normal((heads, K))
    return arguments


def weak(*last):
    return lambda rng, shape: -0.2 * rng.random(shape + last)


@functools.cache
def compiled(function, options):
    """Outputs, and gradients of a linear function of them with the given weights."""
    missing = dict.fromkeys(("log_decay", "bonus", "initial_state", "segments"))

    def loss(arguments, weights):
        arguments = missing | arguments
        out = function(**arguments, scale=0.5, normalize=False, smallest=1e-6, **dict(options))
        return sum((o * w).sum() for o, w in zip(out, weights, strict=True)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(function, arguments, weights, **options):
    (_, out), gradients = compiled(function, tuple(options.items()))(arguments, weights)
    return {"o": out[0], "state": out[1], **gradients}


def errors(arguments, **options):
    """Relative errors of the chunked form in float32 against the definition in float64."""
    rng = np.random.default_rng(1)
    shape = arguments["v"].shape
    weights = [rng.standard_normal(s) for s in (shape, arguments["initial_state"].shape)]
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), arguments)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), rounded)
        want = jax.tree.map(np.asarray, run(reference.gated_linear_attention, wide, weights))
    narrow = [w.astype(np.float32) for w in weights]
    got = run(xla.gated_linear_attention, jax.tree.map(jnp.asarray, rounded), narrow, **options)
    return {
        name: np.linalg.norm(np.asarray(got[name]) - want[name]) / np.linalg.norm(want[name]) for name in want
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 16])
def test_chunks_of_every_size_with_one_decay_per_head(chunk, bonus):
    found = errors(draw(decay=weak(), bonus=bonus), chunk=chunk)
    assert max(found.values()) < 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("chunk, leaf", [(1, 1), (8, 1), (16, 4), (32, 8)])
def test_chunks_and_leaves_of_every_size_with_a_decay_per_channel(chunk, leaf, bonus):
    found = errors(draw(decay=weak(K), bonus=bonus), chunk=chunk, leaf=leaf)
    assert max(found.values()) < 1e-6, found


def _alternating(rng, shape):
    return np.where(np.arange(shape[1])[:, None] % 2 == 0, -20.0, -0.03) * np.ones(shape)


def _after_strong_steps(rng, shape):
    """Twenty strong steps, then weak ones: what a difference of long sums would get wrong."""
    return np.where(np.arange(shape[1])[:, None] % 30 < 20, -20.0, -0.03 * rng.random(shape))


PATTERNS = {
    "every_step": lambda rng, shape: np.full(shape, -20.0),
    "alternating": _alternating,
    "weak_after_strong": _after_strong_steps,
    "at_random": lambda rng, shape: np.where(rng.random(shape) < 0.5, -20.0, -0.03 * rng.random(shape)),
    "once": lambda rng, shape: np.where(np.arange(shape[1])[:, None] == 11, -20.0, -1e-3) * np.ones(shape),
    "beyond_all_measure": lambda rng, shape: np.where(
        rng.random(shape) < 0.5, -1e4, -0.03 * rng.random(shape)
    ),
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_strong_decay_costs_no_accuracy(pattern, per_channel):
    def decay(rng, shape):
        values = PATTERNS[pattern](rng, shape)
        if not per_channel:
            return values
        other = PATTERNS[pattern](rng, shape)[:, ::-1]
        return np.stack([values if i % 2 else other for i in range(K)], axis=-1)

    found = errors(draw(150, decay=decay))
    assert max(found.values()) < 1e-6, found


@pytest.mark.sample(2)
@pytest.mark.parametrize("per_channel", [False, True])
def test_decay_to_nothing(per_channel):
    arguments = draw(20, decay=weak(K) if per_channel else weak())
    arguments["log_decay"][:, 7] = -np.inf
    arguments = jax.tree.map(jnp.float32, arguments)
    o, state = gated_linear_attention(**arguments)
    after = {name: x[:, 7:] for name, x in arguments.items() if name != "initial_state"}
    alone, last = gated_linear_attention(**after)
    np.testing.assert_allclose(o[:, 7:], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda g: gated_linear_attention(**{**arguments, "log_decay": g})[0].sum())
    assert np.isfinite(gradient(arguments["log_decay"])).all()


@pytest.mark.parametrize("decay", [None, weak(), weak(K)])
def test_outputs_do_not_see_later_tokens(decay):
    arguments = jax.tree.map(jnp.float32, draw(40, decay=decay))
    moving = {name: x for name, x in arguments.items() if name != "initial_state"}

    def early(moving):
        return xla.gated_linear_attention(
            **({"log_decay": None} | moving),
            bonus=None,
            scale=1.0,
            normalize=False,
            initial_state=None,
            segments=None,
            smallest=1e-6,
            chunk=16,
        )[0][:, 20].sum()

    for name, gradient in jax.grad(early)(moving).items():
        assert (gradient[:, 21:] == 0).all(), name
        assert (gradient[:, :21] != 0).any(), name


def test_a_decay_per_head_is_the_same_decay_in_every_channel():
    arguments = jax.tree.map(jnp.float32, draw(decay=weak()))
    same = jnp.broadcast_to(arguments["log_decay"][..., None], (B, T, H, K))
    scalar = gated_linear_attention(**arguments)
    channel = gated_linear_attention(**{**arguments, "log_decay": same})
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), scalar, channel)


@pytest.mark.sample(4)
@pytest.mark.parametrize("decay", [None, weak(), weak(K)])
@pytest.mark.parametrize("counts", [(1, 2, 6), (6, 3, 2), (2, 3, 6), (1, 1, 1)])
def test_shared_heads_are_repeated_heads(counts, decay):
    arguments = jax.tree.map(jnp.float32, draw(20, heads=6, decay=decay))
    if decay is None and max(counts) < 6:
        counts = (6, *counts[1:])
    shared = {name: arguments[name][:, :, :count] for name, count in zip("qkv", counts)}
    repeated = {name: jnp.repeat(x, 6 // x.shape[2], axis=2) for name, x in shared.items()}
    rest = {name: x for name, x in arguments.items() if name not in shared}
    got = gated_linear_attention(**shared, **rest)
    want = gated_linear_attention(**repeated, **rest)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_normalized_is_a_matrix_of_weights_that_sum_to_one(impl):
    arguments = draw()
    q, k = (jax.nn.elu(jnp.float32(arguments[name])) + 1 for name in "qk")
    v = jnp.float32(arguments["v"])
    scores = jnp.tril(jnp.einsum("bthk,bshk->bhts", q, k))
    want = jnp.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), v)
    o, state = gated_linear_attention(q, k, v, normalize=True, impl=impl)
    np.testing.assert_allclose(o, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[..., -1], k.sum(1), rtol=1e-5)
    np.testing.assert_allclose(state[..., :-1], jnp.einsum("bshk,bshv->bhkv", k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_denominators_near_zero_are_kept_away_from_it(impl):
    q = jnp.float32([0.0, 1e-8, -1e-8, 3.0, -3.0]).reshape(1, 5, 1, 1)
    k = jnp.ones((1, 5, 1, 1)).at[:, 1:].set(0)
    v = jnp.full((1, 5, 1, 1), 2.0)
    o, _ = gated_linear_attention(q, k, v, normalize=True, impl=impl)
    np.testing.assert_allclose(o[0, :, 0, 0], [0, 0.02, 0.02, 2, 2], rtol=1e-5)
    gradient = jax.grad(lambda q: gated_linear_attention(q, k, v, normalize=True, impl=impl)[0].sum())(q)
    assert np.isfinite(gradient).all()


@pytest.mark.sample(3)
@pytest.mark.parametrize("decay", [None, weak(), weak(K)])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_compose_to_the_whole(decay, packed):
    arguments = jax.tree.map(jnp.float32, draw(decay=decay))
    ids = np.ones((B, T), np.int32)
    if packed:
        ids[0, 5:9] = 0
        ids[0, 33:] = 2
    start = arguments.pop("initial_state")
    _, want = gated_linear_attention(**arguments, initial_state=start, segment_ids=jnp.asarray(ids))
    arguments.pop("q")

    def piece(first, last):
        part = {name: x[:, first:last] for name, x in arguments.items()}
        return summarize(**part, segment_ids=jnp.asarray(ids[:, first:last]))

    first, second, third = piece(0, 15), piece(15, 30), piece(30, T)
    for whole in (compose(compose(first, second), third), compose(first, compose(second, third))):
        np.testing.assert_allclose(whole.decay * start + whole.state, want, rtol=1e-4, atol=1e-5)
    identity = compose(Piece(jnp.ones_like(first.decay), jnp.zeros_like(first.state)), first)
    jax.tree.map(np.testing.assert_array_equal, identity, first)


@pytest.mark.parametrize("decay", [None, jnp.float32([-0.1, -0.3])])
def test_arguments_equal_on_all_devices_inside_shard_map(decay):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.standard_normal((8, 20, H, K))) for _ in range(3))
    bonus = jnp.float32(rng.standard_normal((H, K)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")

    def plain(q, k, v, bonus, decay):
        return gated_linear_attention(q, k, v, log_decay=decay, bonus=bonus)

    sharded = jax.shard_map(
        plain, mesh=mesh, in_specs=(rows, rows, rows, PartitionSpec(), PartitionSpec()), out_specs=rows
    )

    def gradients(function):
        numbers = tuple(range(4 if decay is None else 5))
        loss = jax.grad(lambda *x: (function(*x)[0] ** 2).sum(), argnums=numbers)
        return jax.jit(loss)(q, k, v, bonus, decay)

    want = gradients(plain)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradients(sharded), want
    )


@pytest.mark.slow
def test_gradients_of_gradients():
    arguments = jax.tree.map(jnp.float32, draw(20, decay=weak(K)))

    def second(impl):
        def first(k):
            return (gated_linear_attention(**{**arguments, "k": k}, impl=impl)[0] ** 2).sum()

        return jax.grad(lambda k: (jax.grad(first)(k) ** 2).sum())(arguments["k"])

    np.testing.assert_allclose(second("xla"), second("reference"), rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_memory_grows_with_the_length_and_no_faster():
    def peak(time):
        arguments = jax.tree.map(jnp.float32, draw(time, decay=weak(K)))
        gradient = jax.grad(lambda x: gated_linear_attention(**x)[0].sum())
        return jax.jit(gradient).lower(arguments).compile().memory_analysis().temp_size_in_bytes

    assert peak(2048) < 4.5 * peak(512)


def test_errors_say_what_would_work():
    arguments = jax.tree.map(jnp.float32, draw(5, heads=4, decay=weak()))
    with pytest.raises(ValueError, match="q has 3 heads; expected a count that divides the largest, 4"):
        gated_linear_attention(**{**arguments, "q": arguments["q"][:, :, :3]})
    with pytest.raises(
        ValueError, match=r"log_decay has shape .* expected \(h,\), \(b, t, h\) or \(b, t, h, k\)"
    ):
        gated_linear_attention(**{**arguments, "log_decay": jnp.zeros((4, K))})
    with pytest.raises(ValueError, match="log_decay has shape"):
        gated_linear_attention(**{**arguments, "log_decay": jnp.zeros((B, 5, 3))})
    with pytest.raises(ValueError, match="bonus has shape"):
        gated_linear_attention(**arguments, bonus=jnp.ones((4, K + 1)))
    with pytest.raises(ValueError, match=r"initial_state has shape .* \(b, h, k, v \+ 1\) = \(2, 4, 4, 4\)"):
        gated_linear_attention(**arguments, normalize=True)
    with pytest.raises(ValueError, match=r"scale=2.0 has no effect with normalize=True"):
        arguments.pop("initial_state")
        gated_linear_attention(**arguments, normalize=True, scale=2.0)
    with pytest.raises(TypeError, match="k has dtype int32"):
        gated_linear_attention(**{**arguments, "k": jnp.ones((B, 5, 4, K), jnp.int32)})


@pytest.mark.sample(3)
@pytest.mark.parametrize("decay", [None, weak(), weak(K)], ids=["none", "scalar", "channel"])
def test_padding_holds_anything(decay):
    """What stands at padding, even NaN, changes neither results nor gradients."""
    rng = np.random.default_rng(3)
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in draw(12, decay=decay).items()}
    ids = jnp.asarray([[0, 0, 1, 1, 1, 0, 2, 2, 0, 2, 3, 0]] * B, jnp.int32)
    weights = jnp.asarray(rng.standard_normal((B, 12, H, V)), jnp.float32)

    @jax.jit
    def passes(arguments, fill):
        def loss(arguments):
            padding = (ids == 0)[..., None, None]
            filled = {
                name: x
                if name == "initial_state"
                else jnp.where(padding if x.ndim == 4 else padding[..., 0], fill, x)
                for name, x in arguments.items()
            }
            o, state = gated_linear_attention(**filled, segment_ids=ids, impl="xla")
            return (o * weights).sum() + (state**2).sum(), (o, state)

        return jax.value_and_grad(loss, has_aux=True)(arguments)

    want, with_nans = (passes(arguments, fill) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, with_nans, want)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
