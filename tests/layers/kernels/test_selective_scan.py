"""`selective_scan` beyond the shared suite: NumPy's loop, default chunks, memory, pieces, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.segments import Segments
from layers.kernels.selective_scan import compose, selective_scan, summarize, xla

implementations = pytest.mark.parametrize("impl", ["xla", "reference"])


def draw(batch, time, channels=6, states=3, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    series, vectors = (batch, time, channels), (batch, time, groups, states)
    arguments = {
        "x": rng.standard_normal(series),
        "dt": rng.standard_normal(series),
        "a": -np.exp(rng.standard_normal((channels, states))),
        "b": rng.standard_normal(vectors),
        "c": rng.standard_normal(vectors),
        "skip": rng.standard_normal(channels),
        "gate": rng.standard_normal(series),
        "dt_bias": rng.standard_normal(channels),
        "initial_state": rng.standard_normal((batch, channels, states)),
    }
    return {k: jnp.asarray(v, jnp.float32) for k, v in arguments.items()}


def pick(arguments, *names):
    return {name: arguments[name] for name in names}


def in_time(arguments, where):
    return {k: v[:, where] if k in ("x", "dt", "b", "c", "gate") else v for k, v in arguments.items()}


def assert_close(got, want, tolerance=2e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@implementations
def test_is_the_loop_of_the_definition(impl):
    arguments = draw(2, 21, channels=6, states=4, groups=3)
    y, final = selective_scan(**arguments, dt_softplus=True, impl=impl)
    v = {k: np.asarray(u, np.float64) for k, u in arguments.items()}
    h, want = v["initial_state"], np.zeros((2, 21, 6))
    for t in range(21):
        dt = np.log1p(np.exp(v["dt"][:, t] + v["dt_bias"]))
        for i in range(6):
            inputs = dt[:, i, None] * v["x"][:, t, i, None] * v["b"][:, t, i // 2]
            h[:, i] = np.exp(dt[:, i, None] * v["a"][i]) * h[:, i] + inputs
            want[:, t, i] = (h[:, i] * v["c"][:, t, i // 2]).sum(-1) + v["skip"][i] * v["x"][:, t, i]
    assert_close(y, want * v["gate"] / (1 + np.exp(-v["gate"])))
    assert_close(final, h)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("block, blocks", [(8, 8), (5, 3)])
def test_other_chunks_give_the_same(block, blocks):
    """The sizes used on accelerators, and ones that divide nothing; with a segment that ends inside of a block."""
    arguments = draw(2, 150, groups=2)
    ids = jnp.asarray(np.repeat([1, 0, 2, 3], [70, 3, 66, 11])[None].repeat(2, 0), jnp.int32)
    state = arguments.pop("initial_state")

    def outputs(run, arguments):
        return run(**arguments, dt_softplus=True, initial_state=state)

    chunked = functools.partial(xla.selective_scan, block=block, blocks=blocks, segments=Segments.of(ids))
    want = functools.partial(selective_scan, impl="reference", segment_ids=ids)
    weights = jax.tree.map(
        lambda v: np.random.default_rng(1).standard_normal(v.shape), outputs(want, arguments)
    )

    def loss(run, arguments):
        parts = jax.tree.map(
            lambda v, w: (v * jnp.asarray(w, v.dtype)).sum(), outputs(run, arguments), weights
        )
        return sum(jax.tree.leaves(parts))

    values = [jax.value_and_grad(functools.partial(loss, run))(arguments) for run in (chunked, want)]
    jax.tree.map(assert_close, *values)


@implementations
def test_numbers_on_padding_reach_nothing(impl):
    arguments = draw(2, 12)
    ids = jnp.asarray([[0, 1, 1, 0, 0, 1, 2, 2, 0, 2, 2, 0], [3] * 12], jnp.int32)
    empty = (ids == 0)[..., None]

    def loss(arguments, fill):
        filled = {
            k: jnp.where(empty if v.ndim == 3 else empty[..., None], fill, v) if k in in_series else v
            for k, v in arguments.items()
        }
        y, state = selective_scan(**filled, dt_softplus=True, segment_ids=ids, impl=impl)
        return (y**2).sum() + (state**2).sum(), y

    in_series = ("x", "dt", "b", "c", "gate")
    (want, y), gradients = jax.value_and_grad(loss, has_aux=True)(arguments, 0.0)
    np.testing.assert_array_equal(np.asarray(y)[np.asarray(ids) == 0], 0)
    np.testing.assert_array_equal(np.asarray(gradients["x"])[np.asarray(ids) == 0], 0)
    if impl == "xla":
        (got, _), with_nans = jax.value_and_grad(loss, has_aux=True)(arguments, np.nan)
        assert got == want
        jax.tree.map(np.testing.assert_array_equal, with_nans, gradients)


@pytest.mark.slow
def test_extreme_step_sizes():
    """softplus and its slope far out on both sides, and a decay that leaves nothing in float32."""
    arguments = draw(1, 9)
    arguments["dt"] = jnp.asarray(np.resize([-200.0, -40.0, 0.0, 40.0, 1e4], (1, 9, 6)), jnp.float32)

    def loss(impl, arguments):
        y, state = selective_scan(**arguments, dt_softplus=True, impl=impl)
        return (y**2).mean() + (state**2).mean()

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.float64), arguments)
        want = jax.grad(functools.partial(loss, "reference"))(exact)
        want = jax.tree.map(np.asarray, want)
    jax.tree.map(assert_close, jax.grad(functools.partial(loss, "xla"))(arguments), want)


def test_input_types():
    arguments = draw(2, 9)
    half = {k: v.astype(jnp.bfloat16) for k, v in in_time(arguments, slice(None)).items() if k != "dt"}
    y, state = selective_scan(**half | pick(arguments, "dt", "initial_state"), dt_softplus=True)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32


@pytest.mark.slow
def test_memory_holds_no_state_of_every_token():
    """What a longer sequence adds: the states at chunk borders and little else, in numbers a token and channel."""
    states, chunk = 64, 32

    def temporaries(time):
        shapes = jax.eval_shape(lambda: draw(1, time, channels=64, states=states))

        def loss(arguments):
            y, state = xla.selective_scan(
                **arguments, dt_softplus=True, segments=None, block=2, blocks=chunk // 2
            )
            return (y**2).sum() + (state**2).sum()

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    added = (temporaries(2048) - temporaries(1024)) / (4 * 1024 * 64)
    assert added < states / chunk + 3


def test_pieces_pass_states():
    arguments = draw(2, 30)
    ids = jnp.asarray(np.array([[1] * 30, [1] * 13 + [0] * 3 + [2] * 14]), jnp.int32)
    _, want = selective_scan(**arguments, dt_softplus=True, segment_ids=ids)
    names = ("x", "dt", "a", "b", "dt_bias")

    def piece(start, stop):
        where = slice(start, stop)
        cut = in_time(pick(arguments, *names), where)
        return summarize(**cut, dt_softplus=True, segment_ids=ids[:, where])

    first, second, third = piece(0, 10), piece(10, 20), piece(20, 30)
    for whole in (
        compose(compose(first, second), third),
        compose(first, compose(second, third)),
        piece(0, 30),
    ):
        assert_close(whole.decay * arguments["initial_state"] + whole.state, want)
        assert (np.asarray(whole.decay)[1] == 0).all()
    nothing = piece(4, 4)
    for got, same in zip(compose(nothing, first), first, strict=True):
        np.testing.assert_array_equal(got, same)


@pytest.mark.slow
def test_gradients_of_shared_parameters_inside_shard_map():
    """Parameters that all devices share get the sum of their gradients."""
    arguments = draw(8, 7)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    specs = {k: rows if v.ndim > 2 else jax.sharding.PartitionSpec() for k, v in arguments.items()}

    def loss(arguments):
        y, state = selective_scan(**arguments, dt_softplus=True)
        return (y**2).sum() + (state**2).sum()

    def spread(arguments):
        return jax.grad(lambda arguments: jax.lax.psum(loss(arguments), "data"))(arguments)

    got = jax.jit(jax.shard_map(spread, mesh=mesh, in_specs=(specs,), out_specs=specs))(arguments)
    jax.tree.map(assert_close, got, jax.grad(loss)(arguments))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"b": (2, 5, 4, 3), "c": (2, 5, 4, 3)}, ValueError, "b has 4 groups, x has 6 channels"),
        ({"c": (2, 5, 2, 3)}, ValueError, r"c has shape \(2, 5, 2, 3\).*g=1"),
        ({"a": (5, 3)}, ValueError, r"a has shape \(5, 3\).*d=6"),
        ({"gate": (2, 4, 6)}, ValueError, "gate has shape"),
        ({"skip": (5,)}, ValueError, "skip has shape"),
        ({"dt_bias": (6, 1)}, ValueError, "dt_bias has shape"),
        ({"initial_state": (2, 3, 6)}, ValueError, "initial_state has shape"),
    ],
)
def test_errors(change, error, message):
    arguments = draw(2, 5) | {k: jnp.ones(shape) for k, shape in change.items()}
    with pytest.raises(error, match=message):
        selective_scan(**arguments)


def test_complex_numbers_are_refused():
    arguments = draw(2, 5)
    with pytest.raises(TypeError, match="a has dtype complex64"):
        selective_scan(**arguments | {"a": arguments["a"].astype(jnp.complex64)})
