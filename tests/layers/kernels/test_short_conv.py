"""`short_conv` beyond the shared suite: NumPy's convolution, padding inside of segments, pieces, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.segments import Segments
from layers.kernels.short_conv import compose, short_conv, summarize

implementations = pytest.mark.parametrize("impl", ["xla", "reference"])


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def segments(*rows):
    return jnp.asarray([[int(letter) for letter in row] for row in rows], jnp.int32)


@pytest.mark.sample(4)
@implementations
@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("time", [1, 5, 12])
def test_is_numpys_convolution(impl, width, time):
    """np.convolve multiplies its last tap with the oldest input, weight its first."""
    x, weight, bias = normal(2, time, 3), normal(width, 3), normal(3)
    y, state = short_conv(x, weight, bias, impl=impl)
    for row in range(2):
        for channel in range(3):
            want = np.convolve(x[row, :, channel], weight[::-1, channel])[:time] + bias[channel]
            np.testing.assert_allclose(y[row, :, channel], want, rtol=1e-5, atol=1e-5)
    past = np.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    np.testing.assert_array_equal(state, past[:, time:])


@implementations
def test_silu(impl):
    x, weight = normal(1, 6, 2), normal(3, 2)
    plain, _ = short_conv(x, weight, impl=impl)
    y, _ = short_conv(x, weight, activation="silu", impl=impl)
    np.testing.assert_allclose(y, plain / (1 + np.exp(-plain)), rtol=1e-5, atol=1e-6)


@implementations
def test_taps_reach_over_padding(impl):
    """A segment with holes gives what it gives without them; the state holds real tokens only."""
    ids = segments("0110101002022", "1110000000000", "0000000000000")
    x, weight, bias, before = normal(3, 13, 2), normal(4, 2), normal(2), normal(3, 3, 2, seed=1)
    y, state = short_conv(
        x, weight, bias, activation="silu", initial_state=before, segment_ids=ids, impl=impl
    )

    def alone(row, start, stop, state):
        where = start + np.flatnonzero(np.asarray(ids)[row, start:stop])
        part, last = short_conv(x[row, where][None], weight, bias, activation="silu", initial_state=state)
        np.testing.assert_allclose(y[row, where], part[0], rtol=1e-5, atol=1e-6)
        return last[0]

    alone(0, 0, 9, before[:1])
    np.testing.assert_array_equal(state[0], alone(0, 9, 13, None))
    np.testing.assert_array_equal(state[1], alone(1, 0, 13, before[1:2]))
    np.testing.assert_array_equal(state[2], before[2])
    np.testing.assert_array_equal(np.asarray(y)[np.asarray(ids) == 0], 0)


def test_numbers_on_padding_reach_nothing():
    ids = segments("011010200", "111111111")
    x, weight, bias, before = normal(2, 9, 2), normal(4, 2), normal(2), normal(2, 3, 2, seed=1)

    def loss(arguments, fill):
        x, weight, bias, before = arguments
        x = jnp.where((ids == 0)[..., None], fill, x)
        y, state = short_conv(
            x, weight, bias, activation="silu", initial_state=before, segment_ids=ids, impl="xla"
        )
        return (y**2).sum() + (state**2).sum()

    arguments = (x, weight, bias, before)
    want, with_nans = (jax.value_and_grad(loss)(arguments, fill) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, with_nans, want)


@implementations
def test_state_is_float32_and_exact(impl):
    x, weight = normal(1, 5, 2).astype(jnp.bfloat16), normal(4, 2)
    y, state = short_conv(x, weight, impl=impl)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    np.testing.assert_array_equal(state, x[:, 2:].astype(jnp.float32))


@pytest.mark.sample(4)
@pytest.mark.parametrize("cuts", [(2, 3), (0, 9), (5, 12), (13, 14)])
def test_pieces_pass_states(cuts):
    ids = segments("11111111111111", "11110022220333", "00110000000000", "00000000000000")
    x, before = normal(4, 14, 2), normal(4, 3, 2, seed=1)
    _, want = short_conv(x, normal(4, 2), initial_state=before, segment_ids=ids)
    first, second, third = (
        summarize(x[:, start:stop], 4, segment_ids=ids[:, start:stop])
        for start, stop in zip((0, *cuts), (*cuts, 14), strict=True)
    )
    # Where a cut falls between segments, the later piece does not know that it starts one.
    ends = np.asarray(ids)

    def starts(cut):
        left, right = (row[row != 0] for row in (ends[1, :cut], ends[1, cut:]))
        return bool(len(left) and len(right) and left[-1] != right[0])

    second, third = (
        piece._replace(length=piece.length.at[1].set(3)) if starts(cut) else piece
        for piece, cut in zip((second, third), cuts, strict=True)
    )
    state = type(first)(jnp.full(4, 3), before)
    for whole in (compose(compose(first, second), third), compose(first, compose(second, third))):
        np.testing.assert_array_equal(compose(state, whole).state, want)


def test_piece_without_segments():
    x, before = normal(2, 2, 3), normal(2, 3, 3, seed=1)
    piece = summarize(x, 4)
    state = type(piece)(jnp.full(2, 3), before)
    _, want = short_conv(x, normal(4, 3), initial_state=before)
    np.testing.assert_array_equal(compose(state, piece).state, want)
    np.testing.assert_array_equal(piece.length, [2, 2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": (1, 3)}, "weight has 1 taps; expected 2 to 8"),
        ({"weight": (9, 3)}, "weight has 9 taps; expected 2 to 8"),
        ({"weight": (4, 2)}, r"weight has shape \(4, 2\)"),
        ({"bias": (4,)}, r"bias has shape \(4,\)"),
        ({"initial_state": (2, 4, 3)}, r"initial_state has shape \(2, 4, 3\)"),
    ],
)
def test_errors(arguments, message):
    shapes = {"x": (2, 5, 3), "weight": (4, 3)} | arguments
    with pytest.raises(ValueError, match=message):
        short_conv(**{name: jnp.ones(shape) for name, shape in shapes.items()})


def test_unknown_activation_and_width_are_refused():
    with pytest.raises(ValueError, match="activation='relu'; expected None or 'silu'"):
        short_conv(jnp.ones((1, 2, 3)), jnp.ones((4, 3)), activation="relu")
    with pytest.raises(ValueError, match="width=9; expected 2 to 8"):
        summarize(jnp.ones((1, 2, 3)), 9)


@pytest.mark.parametrize("packed", [True, False])
def test_padding_at_the_end_takes_no_gathers(packed):
    """Shifts and masks give what gathers give, in both passes, whatever stands at padding."""
    ids = (
        segments("112223330", "111111100", "000000000")
        if packed
        else segments("111111111", "110000000", "000000000")
    )
    arguments = normal(3, 9, 2), normal(4, 2), normal(2), normal(3, 3, 2, seed=1)
    known = Segments.of(ids, padding="end", packed=packed)

    def loss(arguments, given, fill):
        x, weight, bias, before = arguments
        x = jnp.where((ids == 0)[..., None], fill, x)
        y, state = short_conv(x, weight, bias, activation="silu", initial_state=before, segment_ids=given)
        return (y**2).sum() + (state**2 * jnp.arange(1.0, 7.0).reshape(1, 3, 2)).sum(), (y, state)

    passes = jax.value_and_grad(loss, has_aux=True)
    want, got = passes(arguments, ids, 0.0), passes(arguments, known, jnp.nan)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), got, want)
    assert "gather" not in str(jax.make_jaxpr(lambda *a: passes(*a, 0.0))(arguments, known))
    assert "gather" in str(jax.make_jaxpr(lambda *a: passes(*a, 0.0))(arguments, ids))
