"""What the shared suite does not ask of the delta rules: identities, pieces, exact decay, head groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.delta_rule import (
    Piece,
    cases,
    compose,
    delta_rule,
    dplr_delta_rule,
    summarize,
    summarize_dplr,
    xla,
)
from layers.kernels.delta_rule.decay import scores
from layers.kernels.delta_rule.triangular import inverse


def draw(function, time, batch=1, seed=0, **sizes):
    arguments = function(np.random.default_rng(seed), batch, time, **sizes)
    return {name: jnp.asarray(value, jnp.float32) for name, value in arguments.items()}


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("size", [1, 16, 128])
def test_inverse_of_a_unit_triangular_matrix(size):
    rng = np.random.default_rng(size)
    lower = np.tril(rng.uniform(-0.5, 0.5, (3, size, size)), -1)
    want = np.linalg.inv(np.eye(size) + lower)
    got = np.asarray(inverse(jnp.asarray(lower, jnp.float32)))
    assert error(got, want) < 1e-5
    assert not np.triu(got, 1).any()


@pytest.mark.sample(4)
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("before_decay", [False, True])
def test_scores_and_their_gradients_are_exact_after_strong_decay(width, before_decay):
    """Weak decay that follows 20 a step is not lost in the rounding of a long sum."""
    rng = np.random.default_rng(0)
    size, dim = 64, 3
    erase, query, column = rng.standard_normal((3, size, dim))
    g = np.where(np.arange(size)[:, None] % 32 < 24, -20.0, -0.1 * rng.random((size, width)))
    weights = rng.standard_normal((2, size, size))

    def dense(erase, query, column, g):
        """Every sum of log-decay written out."""
        g = jnp.broadcast_to(g, (size, dim))
        time = jnp.arange(size)

        def decayed(row, last, diagonal):
            taken = (time[None, None] > time[None, :, None]) & (time[None, None] <= last[:, None, None])
            exponent = jnp.einsum("ijl,lc->ijc", taken.astype(g.dtype), g)
            return jnp.tril(jnp.einsum("ic,jc,ijc->ij", row, column, jnp.exp(exponent)), diagonal)

        erased = decayed(erase, time - 1 if before_decay else time, -1)
        return jnp.sum(erased * weights[0] + decayed(query, time, 0) * weights[1])

    def ours(erase, query, column, g):
        (erased,), (read,), _ = scores(erase, query, [column], g, before_decay, jnp.float32)
        return jnp.sum(jnp.tril(erased, -1) * weights[0] + read * weights[1], dtype=jnp.float32)

    arguments = erase, query, column, g
    with jax.enable_x64(True):
        want = jax.jit(jax.grad(dense, (0, 1, 2, 3)))(*(jnp.asarray(x) for x in arguments))
        want = jax.tree.map(np.asarray, want)
    got = jax.jit(jax.grad(ours, (0, 1, 2, 3)))(*(jnp.asarray(x, jnp.float32) for x in arguments))
    for name, g, w in zip(("erase", "query", "column", "log_decay"), got, want, strict=True):
        assert error(g, w) < 2e-6, name


@pytest.mark.parametrize("function", [cases._channel, cases._strong_channel])
def test_delta_rule_is_the_general_rule_with_the_keys_as_factors(function):
    """A = alpha k, b = -beta k; with a decay per channel the order of decay and erasure matters."""
    x = draw(function, 70)
    o, state = delta_rule(**x)
    decayed, written = jnp.exp(x["log_decay"]) * x["k"], x["beta"][..., None] * x["k"]
    general = dplr_delta_rule(x["q"], written, x["v"], decayed, -written, log_decay=x["log_decay"])
    assert error(general[0], o) < 1e-5
    assert error(general[1], state) < 1e-5
    erase_first = dplr_delta_rule(
        x["q"], written, x["v"], x["k"], -written * jnp.exp(x["log_decay"]), log_decay=x["log_decay"]
    )
    assert error(erase_first[0], o) > 1e-2


def test_a_key_written_again_is_overwritten():
    keys = jnp.tile(jnp.eye(4), (2, 1))[None, :, None]
    values = jax.random.normal(jax.random.key(0), (1, 8, 1, 3))
    _, state = delta_rule(keys, keys, values, jnp.ones((1, 8, 1)))
    np.testing.assert_allclose(state[0, 0], values[0, 4:, 0], atol=1e-6)


def test_one_decay_a_head_equals_the_same_decay_in_every_channel():
    x = draw(cases._scalar, 70)
    channels = jnp.broadcast_to(x["log_decay"][..., None], x["k"].shape)
    o, _ = delta_rule(**x)
    assert error(delta_rule(**x | {"log_decay": channels})[0], o) < 1e-5


def test_head_groups_share_queries_and_keys():
    x = draw(cases._channel, 20, heads=6, groups=2)
    repeated = x | {name: jnp.repeat(x[name], 3, axis=2) for name in ("q", "k")}
    np.testing.assert_allclose(delta_rule(**x)[0], delta_rule(**repeated)[0], atol=1e-6)


@pytest.mark.sample(4)
@pytest.mark.parametrize("chunk", [1, 4, 16, 128])
def test_chunk_size_changes_nothing(chunk):
    x = draw(cases._channel, 130)
    options = {"scale": 1.0, "normalize_qk": False, "initial_state": None, "segments": None}
    o, state = xla.delta_rule(**x, **options, chunk=chunk)
    want, want_state = delta_rule(**x, scale=1.0, impl="reference")
    assert error(o, want) < 1e-5
    assert error(state, want_state) < 1e-5


@pytest.mark.sample(2)
@pytest.mark.parametrize("general", [False, True])
def test_pieces_compose_to_the_whole(general):
    x = draw(cases._rwkv7 if general else cases._channel, 50, batch=2)
    function, pieces = (dplr_delta_rule, summarize_dplr) if general else (delta_rule, summarize)
    state = jnp.asarray(cases._state(np.random.default_rng(1), 2), jnp.float32)
    _, want = function(**x, initial_state=state)

    def piece(steps):
        return pieces(**{name: array[:, steps] for name, array in x.items() if name != "q"})

    first, second, third = piece(slice(0, 17)), piece(slice(17, 18)), piece(slice(18, None))
    for whole in (compose(compose(first, second), third), compose(first, compose(second, third))):
        assert error(whole.transition @ state + whole.state, want) < 1e-5
    identity = Piece(
        jnp.broadcast_to(jnp.eye(cases.KEY_DIM), first.transition.shape), jnp.zeros_like(first.state)
    )
    assert error(compose(identity, first).state, first.state) < 1e-6


def test_a_piece_with_a_new_segment_forgets_what_came_before():
    x = draw(cases._channel, 9)
    del x["q"]
    ids = jnp.asarray([[1, 1, 1, 0, 2, 2, 2, 2, 2]])
    piece = summarize(**x, segment_ids=ids)
    assert not np.asarray(piece.transition).any()
    _, want = delta_rule(jnp.zeros_like(x["k"]), **x, segment_ids=ids)
    assert error(piece.state, want) < 1e-6


def test_steps_in_bfloat16_keep_the_state_in_float32():
    x = {name: value.astype(jnp.bfloat16) for name, value in draw(cases._scalar, 40).items()}
    want, want_state = delta_rule(**{name: value.astype(jnp.float32) for name, value in x.items()})
    state, outputs = jnp.zeros((1, cases.HEADS, cases.KEY_DIM, cases.VALUE_DIM)), []
    for t in range(40):
        o, state = delta_rule(**{name: value[:, t : t + 1] for name, value in x.items()}, initial_state=state)
        outputs.append(o)
    assert state.dtype == jnp.float32
    assert error(jnp.concatenate(outputs, 1).astype(jnp.float32), want) < 1e-2
    assert error(state, want_state) < 1e-2


def test_later_steps_have_exactly_no_influence():
    x = draw(cases._channel, 40)

    def early(x):
        return jnp.sum(delta_rule(**x)[0][:, :21] ** 2)

    for name, gradient in jax.jit(jax.grad(early))(x).items():
        assert np.asarray(gradient[:, :21]).any(), name
        assert not np.asarray(gradient[:, 21:]).any(), name


@pytest.mark.slow
def test_gradients_of_gradients():
    x = draw(cases._scalar, 5)

    def norm_of_gradient(x, impl):
        gradients = jax.grad(lambda x: jnp.sum(delta_rule(**x, impl=impl)[0] ** 2))(x)
        return sum(jnp.sum(g**2) for g in gradients.values())

    got, want = (
        jax.jit(jax.grad(norm_of_gradient), static_argnums=1)(x, impl) for impl in ("xla", "reference")
    )
    for name in x:
        assert error(got[name], want[name]) < 1e-4, name


@pytest.mark.slow
def test_memory_grows_linearly_with_time():
    def scratch(time):
        x = jax.eval_shape(lambda: draw(cases._plain, time))
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(delta_rule(**x)[0])))
        return gradient.lower(x).compile().memory_analysis().temp_size_in_bytes

    assert scratch(1024) < 2.2 * scratch(512)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (1, 3, 2, 4)}, "k has shape"),
        ({"q": (1, 3, 3, 5), "k": (1, 3, 3, 5)}, "q and k have 3 heads, v has 2"),
        ({"log_decay": (1, 3)}, "log_decay has shape"),
        ({"log_decay": (1, 3, 2, 4)}, "log_decay has shape"),
        ({"initial_state": (1, 2, 4, 5)}, "initial_state has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    x = draw(cases._scalar, 3) | {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        delta_rule(**x)


@pytest.mark.slow
def test_gradients_under_vmap_and_on_meshes():
    x = draw(cases._channel, 20, batch=4)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(delta_rule(**x)[0] ** 2))(x)

    want = jax.jit(gradient)(x)
    nested = {name: value.reshape(2, 2, 1, *value.shape[1:]) for name, value in x.items()}
    got = jax.jit(jax.vmap(jax.vmap(gradient)))(nested)
    results = [{name: value.reshape(want[name].shape) for name, value in got.items()}]
    rows = jax.sharding.PartitionSpec("data")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, rows))
        results.append(jax.jit(gradient)(sharded))
        results.append(jax.jit(jax.shard_map(gradient, in_specs=rows, out_specs=rows))(sharded))
    for result in results:
        for name in x:
            assert error(result[name], want[name]) < 1e-5, name


def test_infinite_decay_forgets():
    x = draw(cases._channel, 12)
    log_decay = x["log_decay"].at[:, 5].set(-jnp.inf)
    o, state = delta_rule(**x | {"log_decay": log_decay})
    later = {name: value[:, 5:] for name, value in x.items()}
    want, want_state = delta_rule(**later)
    assert error(o[:, 5:], want) < 1e-6
    assert error(state, want_state) < 1e-6
    gradients = jax.jit(jax.grad(lambda x: jnp.sum(delta_rule(**x)[0])))(x | {"log_decay": log_decay})
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
