"""The shared suite of the primitives: every implementation of every case against the float64 reference.

Relative errors are norms of differences over norms. float32: 2e-5 unless a case states its own; bfloat16 inputs: 1e-2.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from tests.layers.kernels.suites import SUITES, by_call

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
LENGTHS = (
    pytest.param(1, marks=pytest.mark.slow),
    pytest.param(2, marks=pytest.mark.slow),
    pytest.param(37, marks=[pytest.mark.smoke, pytest.mark.slow]),
    130,
)
calls = by_call()
# The first two cases stand for the others where those are compared otherwise too.
calls_of_one = by_call(slow=lambda name, case, impl: impl == "tpu" or case is not SUITES[name].cases[0])


def draw(case, batch, time, *, with_state=True, seed=0):
    """Float64 arguments of a case, with its initial state if it has one."""
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode()), batch, time])
    arguments = case.draw(rng, batch, time)
    if case.state is not None and with_state:
        arguments["initial_state"] = case.state(rng, batch)
    return arguments


def cast(arguments, dtype):
    """Arguments in the type under test; complex numbers have no bfloat16 and go to complex64."""

    def one(value):
        value = np.asarray(value)
        if np.iscomplexobj(value):
            return jnp.asarray(value, jnp.complex64)
        return jnp.asarray(value, dtype) if np.issubdtype(value.dtype, np.floating) else jnp.asarray(value)

    state = {key: cast_state(value) for key, value in arguments.items() if key == "initial_state"}
    return jax.tree.map(one, {k: v for k, v in arguments.items() if k != "initial_state"}) | state


def cast_state(state):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.complex64 if np.iscomplexobj(v) else jnp.float32), state)


def wide(arguments):
    """The same numbers in float64."""

    def one(value):
        value = np.asarray(value)
        if np.iscomplexobj(value):
            return value.astype(np.complex128)
        return value.astype(np.int32 if np.issubdtype(value.dtype, np.integer) else np.float64)

    return jax.tree.map(one, arguments)


def call(suite, case, impl, arguments, **extra):
    return suite.function(**arguments, **case.options, **extra, impl=impl)


def close(got, want, tolerance, message):
    got_leaves, want_leaves = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got_leaves) == len(want_leaves)
    for g, w in zip(got_leaves, want_leaves, strict=True):
        g, w = np.asarray(g), np.asarray(w)
        g = g.astype(np.complex128 if np.iscomplexobj(g) else np.float64)
        assert g.shape == w.shape, f"{message}: shape {g.shape} instead of {w.shape}"
        assert np.isfinite(g).all(), f"{message}: not finite"
        error = np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-30)
        assert error <= tolerance or np.linalg.norm(g - w) < 1e-12, f"{message}: relative error {error:.2e}"


def tolerance_of(case, dtype):
    return max(TOLERANCE[dtype], case.tolerance or 0.0) if dtype == "float32" else TOLERANCE[dtype]


def close_gradients(got, want, arguments, out, weights, tolerance):
    """Compares gradients of the weighted sum of `out`.

    One that is zero, as that of the logits of a single key, comes from terms that cancel. What is left of them is compared
    with the size that such terms have: that of the sum over that of the argument.
    """

    def norm(tree):
        return np.sqrt(sum(np.linalg.norm(np.asarray(leaf)) ** 2 for leaf in jax.tree.leaves(tree)))

    for key in want:
        size = norm(weights) * norm(out) / max(norm(arguments[key]), 1e-30)
        if norm(want[key]) <= 1e-12 * size:
            assert norm(got[key]) <= tolerance * size, f"gradient of {key}: {norm(got[key]):.1e} instead of 0"
        else:
            close(got[key], want[key], tolerance, f"gradient of {key}")


def weights_like(tree, seed=1):
    rng = np.random.default_rng(seed)

    def one(v):
        real = rng.standard_normal(v.shape)
        return real + 1j * rng.standard_normal(v.shape) if np.iscomplexobj(v) else real

    return jax.tree.map(one, tree)


def parted(arguments):
    """Float arguments, and those of integers."""
    floats = {
        k: v for k, v in arguments.items() if not np.issubdtype(jax.tree.leaves(v)[0].dtype, np.integer)
    }
    return floats, {k: v for k, v in arguments.items() if k not in floats}


def value_and_gradients(suite, case, impl, arguments, weights, **extra):
    """Outputs, and the gradients of a random linear function of them with respect to every float argument."""
    moving, fixed = parted(arguments)

    def loss(moving):
        out = call(suite, case, impl, moving | fixed, **extra)
        parts = jax.tree.map(
            lambda o, w: jnp.sum((o * jnp.asarray(w, jnp.result_type(o, jnp.float32))).real), out, weights
        )
        return sum(jax.tree.leaves(parts)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(moving)
    return out, gradients


def beside_reference(suite, case, impl, arguments, **extra):
    """Outputs and gradients, those of the float64 reference, and what weights the outputs; `extra` goes to the calls."""
    with jax.enable_x64(True):
        exact = jax.tree.map(jnp.asarray, wide(arguments))
        shapes = jax.eval_shape(lambda a: call(suite, case, "reference", a, **extra), exact)
        weights = weights_like(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
        want = value_and_gradients(suite, case, "reference", exact, weights, **extra)
        want = jax.tree.map(np.asarray, want)
    return value_and_gradients(suite, case, impl, arguments, weights, **extra), want, weights


@functools.cache
def reference(name, case_index, time, dtype):
    """Float64 outputs and gradients on the numbers that the type under test can hold. Computed once per shape."""
    suite = SUITES[name]
    case = suite.cases[case_index]
    arguments = wide(cast(draw(case, 2, time), dtype))
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, arguments)
        shapes = jax.eval_shape(lambda a: call(suite, case, "reference", a), arguments)
        weights = weights_like(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
        out, gradients = value_and_gradients(suite, case, "reference", arguments, weights)
        return jax.tree.map(np.asarray, (out, gradients)), weights


@pytest.mark.sample(2)
@calls
@pytest.mark.parametrize("time", LENGTHS)
def test_forward_and_gradients_match_float64_reference(name, case, impl, time):
    suite = SUITES[name]
    (want, want_gradients), weights = reference(name, suite.cases.index(case), time, "float32")
    arguments = cast(draw(case, 2, time), "float32")
    got, gradients = value_and_gradients(suite, case, impl, arguments, weights)
    close(got, want, tolerance_of(case, "float32"), "outputs")
    close_gradients(gradients, want_gradients, arguments, want, weights, tolerance_of(case, "float32"))


@calls_of_one
def test_bfloat16_inputs(name, case, impl):
    suite = SUITES[name]
    (want, want_gradients), weights = reference(name, suite.cases.index(case), 130, "bfloat16")
    arguments = cast(draw(case, 2, 130), "bfloat16")
    got, gradients = value_and_gradients(suite, case, impl, arguments, weights)
    close(got, want, TOLERANCE["bfloat16"], "outputs")
    close_gradients(gradients, want_gradients, arguments, want, weights, TOLERANCE["bfloat16"])
    for key in gradients:
        assert jax.tree.leaves(gradients[key])[0].dtype == jax.tree.leaves(arguments[key])[0].dtype
    if case.state is not None:
        for leaf in jax.tree.leaves(got[1]):
            assert leaf.dtype in (jnp.float32, jnp.complex64, jnp.int32), (
                "states are float32 whatever the input type"
            )


@calls_of_one
@settings(max_examples=2)
@given(data=st.data())
def test_cut_anywhere(name, case, impl, data):
    if case.state is None:
        assert not case.segments or name in ("attention", "long_conv")
        return
    suite = SUITES[name]
    time = data.draw(st.sampled_from((19, 70)), label="time")
    cut = data.draw(st.integers(0, time), label="cut")
    arguments = cast(draw(case, 2, time), "float32")
    whole, final = call(suite, case, impl, arguments)

    def part(piece, state):
        sliced = {
            k: v[:, piece] if k in suite.time_arguments and v.ndim > 1 and v.shape[1] == time else v
            for k, v in arguments.items()
        }
        return call(suite, case, impl, sliced | {"initial_state": state})

    pieces = [slice(None, cut), slice(cut, None)]
    backwards = case.options.get("reverse", False)
    outputs, state = [], arguments["initial_state"]
    for piece in reversed(pieces) if backwards else pieces:
        output, state = part(piece, state)
        outputs.append(output)
    joined = jnp.concatenate(outputs[::-1] if backwards else outputs, axis=1)
    close(joined, np.asarray(whole), tolerance_of(case, "float32"), f"cut at {cut} of {time}")
    close(state, jax.tree.map(np.asarray, final), tolerance_of(case, "float32"), "final state")


@calls_of_one
@settings(max_examples=3)
@given(data=st.data())
def test_packed_equals_separate_and_padding_is_skipped(name, case, impl, data):
    """Segments with padding before, between and after, against each segment run alone."""
    if not case.segments:
        with pytest.raises((TypeError, ValueError), match="segment_ids"):
            arguments = cast(draw(case, 2, 5), "float32")
            call(SUITES[name], case, impl, arguments, segment_ids=jnp.ones((2, 5), jnp.int32))
        return
    suite = SUITES[name]
    time = 41
    ids = np.zeros(time, np.int32)
    bounds = sorted(data.draw(st.lists(st.integers(0, time), min_size=4, max_size=4), label="bounds"))
    ids[bounds[0] : bounds[1]] = 7
    ids[bounds[2] : bounds[3]] = 3
    arguments = cast(draw(case, 2, time), "float32")
    out = call(suite, case, impl, arguments, segment_ids=jnp.asarray(np.stack([ids, ids])))
    if case.indexed:
        want = call(suite, case, "reference", arguments, segment_ids=jnp.asarray(np.stack([ids, ids])))
        close(out, np.asarray(want), tolerance_of(case, "float32"), "segments")
        assert not np.asarray(out)[:, ids == 0].any()
        return
    stateful = case.state is not None
    packed, final = out if stateful else (out, None)
    backwards = case.options.get("reverse", False)
    state = arguments.get("initial_state")
    for segment in (3, 7) if backwards else (7, 3):
        where = np.flatnonzero(ids == segment)
        if where.size == 0:
            continue
        alone = {
            k: v[:, where] if k in suite.time_arguments and v.ndim > 1 and v.shape[1] == time else v
            for k, v in arguments.items()
            if k != "initial_state"
        }
        if state is not None:
            alone["initial_state"] = state
        separate = call(suite, case, impl, alone)
        if stateful:
            separate, last = separate
            state = jax.tree.map(jnp.zeros_like, last)
            finished = last
        close(packed[:, where], np.asarray(separate), tolerance_of(case, "float32"), f"segment {segment}")
    if stateful:
        want = finished if (ids != 0).any() else arguments["initial_state"]
        close(final, jax.tree.map(np.asarray, want), tolerance_of(case, "float32"), "final state")


@pytest.mark.slow
@calls
def test_segment_gradients_match_reference(name, case, impl):
    if not case.segments:
        return
    ids = np.array([[0] * 3 + [1] * 10 + [0] * 2 + [2] * 9 + [5] * 6 + [0] * 4, [2] * 34], np.int32)
    arguments = cast(draw(case, 2, ids.shape[1]), "float32")
    got, want, weights = beside_reference(SUITES[name], case, impl, arguments, segment_ids=jnp.asarray(ids))
    close(got[0], want[0], tolerance_of(case, "float32"), "outputs")
    close_gradients(got[1], want[1], arguments, want[0], weights, tolerance_of(case, "float32"))


def by_rows(suite, arguments):
    """Arguments with one row for each of the eight sequences, and those that the sequences share."""
    rows = {
        k: v
        for k, v in arguments.items()
        if k == "initial_state" or (k in suite.time_arguments and v.shape[0] == 8)
    }
    return rows, {k: v for k, v in arguments.items() if k not in rows}


def over_devices(function, in_specs, out_specs):
    """`function` with its rows shared out over eight devices; JAX checks what differs between them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


ROWS, SHARED = PartitionSpec("data"), PartitionSpec()


@pytest.mark.slow
@calls
def test_transformations(name, case, impl):
    """jit, vmap, checkpoint, scan and shard_map give what the plain call gives."""
    suite = SUITES[name]
    arguments = cast(draw(case, 8, 11), "float32")
    plain = jax.tree.map(np.asarray, call(suite, case, impl, arguments))
    tolerance = tolerance_of(case, "float32")

    def run(moving, rest):
        return call(suite, case, impl, moving | rest)

    moving, rest = by_rows(suite, arguments)
    close(jax.jit(run)(moving, rest), plain, tolerance, "jit")
    close(jax.checkpoint(run)(moving, rest), plain, tolerance, "checkpoint")
    split = jax.tree.map(lambda v: v.reshape(4, 2, *v.shape[1:]), moving)
    merge = functools.partial(jax.tree.map, lambda v: v.reshape(8, *v.shape[2:]))
    close(merge(jax.vmap(run, in_axes=(0, None))(split, rest)), plain, tolerance, "vmap")
    _, scanned = jax.lax.scan(lambda carry, part: (carry, run(part, rest)), None, split)
    close(merge(scanned), plain, tolerance, "scan")
    close(over_devices(run, (ROWS, SHARED), ROWS)(moving, rest), plain, tolerance, "shard_map")


@calls_of_one
def test_gradients_inside_shard_map(name, case, impl):
    """Those of arguments that the devices share are summed over them. Types in every case, numbers in one a primitive."""
    suite = SUITES[name]
    moving, rest = by_rows(suite, cast(draw(case, 8, 11), "float32"))
    floats, integers = zip(*(parted(part) for part in (moving, rest)), strict=True)

    def loss(moving, rest, *integers):
        out = call(suite, case, impl, moving | rest | integers[0] | integers[1])
        return sum(jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(out))

    gradients = jax.grad(loss, argnums=(0, 1))
    inside = over_devices(gradients, (ROWS, SHARED, ROWS, SHARED), (ROWS, SHARED))
    if case is not next((c for c in suite.cases if by_rows(suite, draw(c, 8, 11))[1]), suite.cases[0]):
        jax.eval_shape(inside, *floats, *integers)
        return
    want = jax.tree.map(np.asarray, jax.jit(gradients)(*floats, *integers))
    close(inside(*floats, *integers), want, tolerance_of(case, "float32"), "gradients")


@calls_of_one
def test_empty_and_single_sequences(name, case, impl):
    suite = SUITES[name]
    one = call(suite, case, impl, cast(draw(case, 1, 3), "float32"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.tree.map(np.asarray, one)))
    if case.state is None:
        return
    arguments = cast(draw(case, 2, 0), "float32")
    empty, state = call(suite, case, impl, arguments)
    assert empty.shape[:2] == (2, 0)
    close(state, jax.tree.map(np.asarray, arguments["initial_state"]), 0, "state of an empty sequence")


@pytest.mark.parametrize("name", SUITES)
def test_unknown_implementation_is_refused_with_the_names(name):
    suite = SUITES[name]
    case = suite.cases[0]
    with pytest.raises(ValueError, match="impl='refrence'.*did you mean 'reference'"):
        call(suite, case, "refrence", cast(draw(case, 1, 3), "float32"))


@pytest.mark.parametrize("name", SUITES)
def test_errors_name_the_argument(name):
    suite = SUITES[name]
    case = suite.cases[0]
    arguments = cast(draw(case, 2, 5), "float32")
    for key in arguments:
        if key == "initial_state":
            continue
        wrong = {**arguments, key: arguments[key][..., None]}
        with pytest.raises((ValueError, TypeError), match=key):
            call(suite, case, None, wrong)
    if case.segments:
        with pytest.raises(TypeError, match="segment_ids"):
            call(suite, case, None, arguments, segment_ids=jnp.ones((2, 5)))
        with pytest.raises(ValueError, match="segment_ids"):
            call(suite, case, None, arguments, segment_ids=jnp.ones((2, 6), jnp.int32))


@pytest.mark.parametrize("left, passes", [(0.0, True), (1e-7, True), (1e-4, False)])
def test_gradients_that_are_zero_are_compared_with_what_cancels(left, passes):
    want, arguments = {"q": np.zeros(3)}, {"q": np.ones(3)}

    def check():
        close_gradients({"q": np.full(3, left)}, want, arguments, np.ones(3), np.ones(3), 2e-5)

    if passes:
        check()
    else:
        with pytest.raises(AssertionError, match="instead of 0"):
            check()
