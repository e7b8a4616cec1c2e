"""`Segments` against a loop over the tokens of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layers.kernels.segments import Segments, last_real_id, select_real

ROWS, TIME = 3, 12
FIELDS = ("numbers", "positions", "starts")
rows = st.lists(st.integers(0, 3), min_size=TIME, max_size=TIME)
# Padding inside segments and ids that come back behind others; nothing but padding; no padding.
awkward = [[0, 0, 7, 0, 7, 5, 0, 5, 7, 7, 0, 0], [0] * TIME, [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 3]]


def literal(row):
    """Numbers, positions and starts of one row, token by token."""
    number, position, before = 0, 0, None
    numbers, positions, starts = [], [], []
    for token in row:
        if token == 0:
            numbers.append(0)
            starts.append(False)
            positions.append(None)
            continue
        start = token != before
        number, position = (number + 1, 0) if start else (number, position + 1)
        numbers.append(number)
        positions.append(position)
        starts.append(start and number > 1)
        before = token
    return numbers, positions, starts


def check(segments, ids):
    """Every field is that of the loop; a position means nothing at padding."""
    for row, given_ids in enumerate(ids):
        numbers, positions, starts = literal(given_ids)
        np.testing.assert_array_equal(segments.numbers[row], numbers)
        np.testing.assert_array_equal(segments.starts[row], starts)
        real = np.flatnonzero(given_ids)
        np.testing.assert_array_equal(np.asarray(segments.positions[row])[real], [positions[i] for i in real])
    assert (np.asarray(segments.positions) >= 0).all()
    np.testing.assert_array_equal(segments.ids, ids)
    np.testing.assert_array_equal(segments.real, np.asarray(ids) != 0)


@given(ids=st.lists(rows, min_size=ROWS, max_size=ROWS))
@example(ids=awkward)
def test_fields_equal_the_loop(ids):
    check(Segments.of(jnp.asarray(ids, jnp.int32)), ids)


@given(ids=st.lists(rows, min_size=ROWS, max_size=ROWS))
@example(ids=awkward)
def test_fields_equal_the_loop_where_padding_is_known_to_be_at_the_ends(ids):
    ids = [[token for token in row if token] + [0] * row.count(0) for row in ids]
    segments = Segments.of(jnp.asarray(ids, jnp.int32), padding="end")
    assert segments.padding == "end"
    check(segments, ids)


@pytest.mark.parametrize("padding", ["anywhere", "end"])
def test_fields_equal_the_loop_where_no_row_is_packed(padding):
    ids = [[2] * 5 + [0] * 7, [0] * TIME, [9] * TIME]
    if padding == "anywhere":
        ids[0] = [0, 2, 0, 2, 2, 0, 0, 0, 2, 0, 2, 0]
    segments = Segments.of(jnp.asarray(ids, jnp.int32), padding=padding, packed=False)
    assert not segments.packed
    check(segments, ids)


@given(ids=rows, cuts=st.tuples(st.integers(0, TIME), st.integers(0, TIME)))
def test_a_cut_is_numbered_anew(ids, cuts):
    start, stop = sorted(cuts)
    cut = Segments.of(jnp.asarray([ids], jnp.int32)).cut(start, stop)
    assert cut.shape == (1, stop - start)
    check(cut, [ids[start:stop]])


def test_static_facts_pass_through_transformations():
    segments = Segments.of(jnp.asarray([[1, 1, 0]]), padding="end", packed=False)
    again = jax.jit(lambda s: s)(segments)
    assert (again.padding, again.packed) == ("end", False)
    cut = again.cut(1, 3)
    assert (cut.padding, cut.packed) == ("end", False)
    assert len(jax.tree.leaves(segments)) == 1 + len(FIELDS)


def test_none_and_segments_come_back_as_they_are():
    segments = Segments.of(jnp.asarray([[1, 0]]))
    assert Segments.of(segments, padding="end") is segments
    assert Segments.of(None) is None
    with pytest.raises(ValueError, match="padding='start'"):
        Segments.of(jnp.asarray([[1, 0]]), padding="start")


@given(ids=rows, before=st.integers(0, 3))
def test_last_real_id_equals_the_loop(ids, before):
    want, last = [], before
    for token in ids:
        last = token or last
        want.append(last)
    got = last_real_id(jnp.asarray([ids], jnp.int32), jnp.asarray([before], jnp.int32))
    np.testing.assert_array_equal(got[0], want)


def test_select_real_clears_whatever_stands_at_padding():
    x = jnp.asarray([[[1.0, 2.0], [jnp.nan, 3.0], [jnp.inf, 4.0]]])
    ids = jnp.asarray([[1, 0, 0]])
    for segment_ids in (ids, Segments.of(ids)):
        np.testing.assert_array_equal(select_real(x, segment_ids), [[[1, 2], [0, 0], [0, 0]]])
    assert select_real(x, None) is x
