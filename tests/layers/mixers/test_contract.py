"""The contract of mixers, one suite for all. A mixer joins by a line in `table.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layers.mixers import make_mixer
from layers.parameters import LOGICAL_AXES, axes_of, group_of
from seqmodels import build_model
from tests.layers.mixers.table import BY_FOURIER_TRANSFORM, CHOOSES, LIGHT, MIXERS

WIDTH, BATCH, TIME = 8, 2, 24
# Compiling is what these tests cost, so they share lengths: TIME in one piece or cut into pieces of 0, 1, 7 and 16.
SHORT, PART = 7, 16
TOLERANCE = 2e-5
# Whose gradients carry what is not finite to earlier tokens, as README says.
NOT_FINITE_GRADIENTS = {"lstm", "rwkv4", "slstm", "wersa"}
GROUPS = {"default", "no_decay", "no_decay/start", "ssm", "ssm/b", "ssm/dt", "ssm_output"}

FIRST = {name: entry for entry, (name, _) in reversed(MIXERS.items())}
BY_DEFAULT = {entry for name, entry in FIRST.items() if name not in LIGHT}
every_mixer = pytest.mark.parametrize(
    "entry", [pytest.param(entry, marks=[pytest.mark.slow] * (entry not in BY_DEFAULT)) for entry in MIXERS]
)


@functools.cache
def build(entry, dtype="float32"):
    name, options = MIXERS[entry]
    given = {"width": WIDTH, "dtype": jnp.dtype(dtype)}
    return make_mixer(name, options, given=given, rngs=nnx.Rngs(0))


@functools.cache
def runner(entry, dtype="float32"):
    """The mixer as one jitted function: calls of one shape share a compilation."""
    graph, variables = nnx.split(build(entry, dtype))

    @jax.jit
    def run(x, state=None, segment_ids=None):
        # Types are stated, not left to promotion. Activations in bfloat16 may meet states in float32.
        with jax.numpy_dtype_promotion("strict" if dtype == "float32" else "standard"):
            return nnx.merge(graph, variables, copy=True)(x, state, segment_ids=segment_ids)

    return run


def leaves(module):
    """Paths and variables of the parameters of a module."""
    return nnx.to_flat_state(nnx.state(module, nnx.Param))


def inputs(time=TIME, seed=0, batch=BATCH):
    return jnp.asarray(np.random.default_rng([seed, time]).standard_normal((batch, time, WIDTH)), jnp.float32)


def causal(entry):
    return build(entry).causal


def initial_state(entry):
    return build(entry).init_state(BATCH, max_length=TIME)


def run_in_pieces(entry, x, cuts, segment_ids=None):
    state = initial_state(entry)
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        ids = None if segment_ids is None else segment_ids[:, start:stop]
        y, state = runner(entry)(x[:, start:stop], state, ids)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def assert_close(got, want, tolerance=TOLERANCE, where=None):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    if where is not None:
        got, want = got[where], want[where]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(
        got, want, atol=tolerance * max(1.0, float(np.abs(want).max(initial=0))), rtol=0
    )


cuts_of_24 = st.sampled_from([[1, 8], [7, 8], [16, 17], [1, 17], [0, 7, 23], [7, 23, 24], [16, 16, 23]])


@every_mixer
@settings(max_examples=6)
@given(cuts=cuts_of_24)
def test_cut_anywhere(entry, cuts):
    if not causal(entry):
        with pytest.raises(ValueError, match="state"):
            build(entry).init_state(BATCH, max_length=TIME)
        with pytest.raises(ValueError, match="state"):
            build(entry)(inputs(), state=())
        return
    x = inputs()
    whole, none = runner(entry)(x)
    assert none is None
    joined, _ = run_in_pieces(entry, x, cuts)
    assert_close(joined, whole)


@every_mixer
def test_step_by_step(entry):
    if not causal(entry):
        assert not causal(entry)
        return
    x = inputs()
    whole, _ = runner(entry)(x)
    joined, _ = run_in_pieces(entry, x, list(range(1, TIME)))
    assert_close(joined, whole)


@st.composite
def packings(draw):
    """Rows of segments with padding before, between, inside and after."""
    rows = []
    for _ in range(BATCH):
        lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        ids = np.concatenate([np.full(n, draw(st.integers(0, 3))) for n in (3, *lengths)])[:TIME]
        row = np.zeros(TIME, np.int32)
        row[: len(ids)] = ids
        row[draw(st.lists(st.integers(0, TIME - 1), max_size=3))] = 0
        rows.append(row)
    return np.stack(rows)


def segments_of(row):
    """Index lists of the maximal runs of equal ids among the real tokens."""
    runs, before = [], None
    for index in np.flatnonzero(row):
        if row[index] != before:
            runs.append([])
        runs[-1].append(index)
        before = row[index]
    return runs


@pytest.mark.sample(2)
@every_mixer
@settings(max_examples=6)
@given(ids=packings())
def test_packed_equals_separate(entry, ids):
    x = inputs()
    packed, _ = runner(entry)(x, None, jnp.asarray(ids))
    for row in range(BATCH):
        for where in segments_of(ids[row]):
            # Alone in a batch of the same shape, so that nothing new compiles.
            alone = jnp.zeros_like(x).at[0, : len(where)].set(x[row, np.asarray(where)])
            marks = jnp.zeros((BATCH, TIME), jnp.int32).at[0, : len(where)].set(1)
            separate, _ = runner(entry)(alone, None, marks)
            assert_close(packed[row, np.asarray(where)], separate[0, : len(where)])


# A cut where one segment ends and another begins: the second call must not see what the first one leaves.
cut_between_segments = np.repeat(np.asarray([[1, 2], [2, 1]], np.int32), [7, 17], axis=1)


@pytest.mark.slow
@every_mixer
@settings(max_examples=3)
@given(ids=packings(), cuts=cuts_of_24)
@example(ids=cut_between_segments, cuts=[7, 8])
def test_packed_and_cut(entry, ids, cuts):
    if not causal(entry):
        assert build(entry).causal is False
        return
    x = inputs()
    whole, _ = runner(entry)(x, None, jnp.asarray(ids))
    joined, _ = run_in_pieces(entry, x, cuts, jnp.asarray(ids))
    assert_close(joined, whole, where=ids != 0)


@pytest.mark.slow
@every_mixer
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_never_leaks(entry, side):
    """Whatever stands in the padding, outputs, state and what follows it are those of the tokens alone."""
    left, right = {"left": (8, 0), "right": (0, 8), "both": (5, 3)}[side]
    x = inputs(PART)
    want, _ = runner(entry)(x)
    outputs = []
    for fill in (0.0, 1e3, np.nan, np.inf):
        padded = jnp.pad(x, ((0, 0), (left, right), (0, 0)), constant_values=fill)
        ids = jnp.pad(jnp.ones(x.shape[:2], jnp.int32), ((0, 0), (left, right)))
        real = slice(left, TIME - right)
        got, _ = runner(entry)(padded, None, ids)
        assert_close(got[:, real], want)
        if causal(entry):
            got, state = runner(entry)(padded, initial_state(entry), ids)
            assert_close(got[:, real], want)
            outputs.append((state, runner(entry)(inputs(SHORT, seed=1), state)[0]))
    if causal(entry):
        for other in outputs[1:]:
            jax.tree.map(np.testing.assert_array_equal, other, outputs[0])
        outputs = [output for _, output in outputs]
        _, state = runner(entry)(x, initial_state(entry))
        assert_close(outputs[0], runner(entry)(inputs(SHORT, seed=1), state)[0])


@pytest.mark.slow
@every_mixer
def test_short_row_with_no_token_leaves_the_state(entry):
    if not causal(entry):
        y, _ = runner(entry)(inputs(), None, jnp.zeros((BATCH, TIME), jnp.int32))
        assert np.isfinite(y).all()
        return
    _, state = runner(entry)(inputs(SHORT), initial_state(entry))
    _, same = runner(entry)(inputs(SHORT, seed=3), state, jnp.zeros((BATCH, SHORT), jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.sample(4)
@every_mixer
def test_causal_means_causal(entry):
    x = inputs(12)
    y, pullback = jax.vjp(lambda x: runner(entry)(x)[0], x)
    for t in (0, 4, 10):
        (reach,) = pullback(jnp.zeros_like(y).at[:, t].set(1.0))
        later = np.abs(np.asarray(reach[:, t + 1 :]))
        largest = np.abs(np.asarray(reach[:, : t + 1])).max()
        assert largest > 0
        if causal(entry):
            rounding = 1e-6 * largest if MIXERS[entry][0] in BY_FOURIER_TRANSFORM else 0
            assert (later <= rounding).all(), f"output {t} depends on a later input"
        else:
            assert later.max() > 0, "a mixer that says it is not causal should see later inputs"


EARLY = (slice(None), slice(0, 17))


@pytest.mark.sample(4)
@every_mixer
def test_what_is_not_finite_reaches_no_earlier_output(entry):
    whole, _ = runner(entry)(inputs())
    for fill in (np.nan, np.inf):
        got, _ = runner(entry)(inputs().at[:, EARLY[1].stop :].set(fill))
        if causal(entry):
            assert_close(got, whole, where=EARLY)
        else:
            assert not np.isfinite(got).all()


@pytest.mark.slow
@every_mixer
def test_what_is_not_finite_reaches_no_gradient_of_an_earlier_input(entry):
    if not causal(entry):
        assert build(entry).causal is False
        return
    run = runner(entry)  # made here, so that no parameter is one of the traced function

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.square(run(x)[0][EARLY]).sum()

    want = gradient(inputs())
    for fill in (np.nan, np.inf):
        got = gradient(inputs().at[:, EARLY[1].stop :].set(fill))
        if MIXERS[entry][0] in NOT_FINITE_GRADIENTS:
            assert not np.isfinite(got).all()
        else:
            assert_close(got, want, where=EARLY)


@pytest.mark.sample(4)
@pytest.mark.smoke
@every_mixer
def test_gradients_are_finite_and_reach_every_parameter(entry):
    """Whatever stands in the padding: 0 x NaN is NaN, in the gradients of weights as much as in outputs."""
    graph, params, rest = nnx.split(build(entry), nnx.Param, ...)
    ids = jnp.asarray(np.repeat([[0, 1, 2, 0]], BATCH, 0).repeat(TIME // 4, 1))
    padding, weights = np.asarray(ids) == 0, inputs(seed=2)

    @jax.jit
    def gradients(params, x, weights):
        def loss(params, x):
            with jax.numpy_dtype_promotion("strict"):
                y, _ = nnx.merge(graph, params, rest, copy=True)(x, segment_ids=ids)
            return jnp.sum(jnp.where(weights != 0, y * weights, 0)), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    clean, y = gradients(params, inputs(), jnp.where(padding[..., None], 0, weights))
    by_parameter, by_input = clean
    for path, gradient in jax.tree.leaves_with_path(by_parameter):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-12, f"{jax.tree_util.keystr(path)} has no gradient"
    assert np.isfinite(by_input).all()
    assert (np.asarray(by_input)[padding] == 0).all(), "padding has a gradient"
    for fill in (np.nan, np.inf):
        x = jnp.where(padding[..., None], fill, inputs())
        jax.tree.map(
            np.testing.assert_array_equal,
            gradients(params, x, jnp.where(padding[..., None], 0, weights))[0],
            clean,
        )
        # What another segment holds reaches neither the outputs of a segment nor their derivatives.
        for number in (1, 2):
            own = np.asarray(ids) == number
            seen = jnp.where(own[..., None], weights, 0)
            (_, want), _ = gradients(params, inputs(), seen)
            (_, got), other = gradients(params, jnp.where(own[..., None], inputs(), fill), seen)
            assert_close(other, y, where=own)
            assert_close(got, want, where=own)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (i % 5 > 0 or MIXERS[name][0] in LIGHT))
        for i, name in enumerate(MIXERS)
    ],
)
def test_types_do_not_depend_on_the_widest_numbers(entry):
    """With 64-bit numbers enabled, float32 stays float32: every constant has a type."""
    graph, params, rest = nnx.split(build(entry), nnx.Param, ...)
    ids = jnp.asarray(np.repeat([[1, 2, 0]], BATCH, 0).repeat(TIME // 3, 1))

    def run(params, x, ids, state):
        y, state = nnx.merge(graph, params, rest, copy=True)(x, state, segment_ids=ids)
        return y, state

    def gradients(params, x, ids):
        def loss(params, x):
            y, _ = run(params, x, ids, None)
            return y.sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    state = initial_state(entry) if causal(entry) else None
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        results = [jax.eval_shape(gradients, params, inputs(), ids)]
        if state is not None:
            results.append(jax.eval_shape(run, params, inputs(), ids, state))
    for path, leaf in jax.tree.leaves_with_path(results):
        assert leaf.dtype not in (jnp.float64, jnp.complex128), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, marks=[pytest.mark.slow] * (entry not in ("mega", "wersa"))) for entry in MIXERS],
)
def test_a_batch_without_rows(entry):
    model = build(entry)
    x = jax.ShapeDtypeStruct((0, 5, WIDTH), jnp.float32)
    assert jax.eval_shape(lambda x: model(x)[0], x).shape == x.shape
    if causal(entry):
        state = model.init_state(0, max_length=TIME)
        y, after = jax.eval_shape(lambda x: model(x, state), x)
        assert y.shape == x.shape
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=[pytest.mark.slow] * (entry not in ("mamba2", "s5-full-spectrum")))
        for entry in MIXERS
    ],
)
def test_strict_promotion_takes_bfloat16_activations_and_initializers(entry):
    """A program that is strict about types in its own arithmetic makes, runs and trains any mixer."""

    def run(x):
        name, options = MIXERS[entry]
        model = make_mixer(name, options, given={"width": WIDTH, "dtype": x.dtype}, rngs=nnx.Rngs(0))
        return nnx.state(model, nnx.Param), jax.grad(lambda x: model(x)[0].astype(jnp.float32).sum())(x)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        parameters, gradient = jax.eval_shape(run, jax.ShapeDtypeStruct((2, 6, WIDTH), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype(jnp.float32)} or not parameters


@pytest.mark.slow
@every_mixer
def test_bfloat16_activations(entry):
    x = inputs()
    want, _ = runner(entry)(x)
    got, _ = runner(entry, "bfloat16")(x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error < (0.5 if MIXERS[entry][0] in CHOOSES else 2e-2)
    for leaf in jax.tree.leaves(nnx.state(build(entry, "bfloat16"), nnx.Param)):
        assert leaf.dtype == jnp.float32, "parameters are float32 whatever the activations"


@every_mixer
def test_parameters_declare_known_groups(entry):
    for path, variable in leaves(build(entry)):
        assert group_of(variable) in GROUPS, path


@pytest.mark.sample(4)
@every_mixer
def test_parameters_declare_logical_axes(entry):
    """A name or None per axis, none twice, and a name for something wherever a matrix grows with the width."""
    name, options = MIXERS[entry]
    more = {"heads": 2 * options["heads"]} if "heads" in options and "state_size" not in options else {}
    given = {"width": 2 * WIDTH, "dtype": jnp.float32}
    wide = make_mixer(name, options | more, given=given, rngs=nnx.Rngs(0))
    wider = dict(leaves(wide))
    for path, variable in leaves(build(entry)):
        axes = axes_of(variable)
        named = [name for name in axes if name is not None]
        assert len(axes) == variable.ndim, path
        assert set(named) <= set(LOGICAL_AXES) - {"layer", "vocab", "mlp", "expert"}, path
        assert len(set(named)) == len(named), path
        if variable.ndim > 1 and wider[path].shape != variable.shape:
            assert named, f"{path} grows with the width and names no axis"


def test_every_group_and_every_logical_axis_is_declared_somewhere():
    axes, groups = set(), set()
    models = [
        {"pattern": ("mamba+swiglu", "s5+moe"), "depth": 4, "mixers": {"s5": {"state_size": 4}}},
        {"pattern": ("tuned_state",), "depth": 1, "mixers": {"tuned_state": {"inner": "lru"}}},
        {
            "pattern": ("attention",),
            "depth": 1,
            "mixers": {"attention": {"heads": 2}},
            "tie_embeddings": False,
        },
    ]
    for model in models:
        built = build_model(
            {"kind": "language_model", "width": 8, "vocab_size": 5, **model}, rngs=nnx.Rngs(0)
        )
        for _, variable in leaves(built):
            axes.update(axes_of(variable))
            groups.add(group_of(variable))
    assert axes == {*LOGICAL_AXES, None}
    assert groups == GROUPS


@every_mixer
def test_refuses_what_it_does_not_know(entry):
    name, options = MIXERS[entry]
    given = {"width": WIDTH}
    with pytest.raises(ValueError, match="no option 'colour'"):
        make_mixer(name, {**options, "colour": "red"}, given=given, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="decode"):
        build(entry)(inputs(3), decode=True)
    with pytest.raises(ValueError, match="x of"):
        build(entry)(inputs(3)[..., :-1])
    with pytest.raises(ValueError, match="segment_ids"):
        build(entry)(inputs(3), segment_ids=jnp.ones((BATCH, 4), jnp.int32))


def test_every_registered_mixer_is_under_the_suite():
    from layers.mixers import MIXERS as registered

    assert {name for name, _ in MIXERS.values()} == set(registered)


def test_unknown_mixer_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        make_mixer("atention", {}, given={"width": 8}, rngs=nnx.Rngs(0))
