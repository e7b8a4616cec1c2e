"""Sequences in memory."""

import numpy as np
import pytest

from experiments.data.sequences import Sequences

SEQUENCES = Sequences.from_records([(b"\1\2\3", 5), (b"\4", 6), (b"\7\10", 4)])


def test_gather_pads_at_the_end():
    batch = SEQUENCES.gather(np.array([2, 0, 2]), 4)
    np.testing.assert_array_equal(batch["inputs"], [[7, 8, 0, 0], [1, 2, 3, 0], [7, 8, 0, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(batch["labels"], [4, 5, 4])
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_gather_never_truncates():
    with pytest.raises(ValueError, match="3 tokens does not fit into a width of 2"):
        SEQUENCES.gather(np.array([0]), 2)


def test_items_and_records():
    assert len(SEQUENCES) == 3
    tokens, label = SEQUENCES[1]
    assert (tokens.tolist(), label) == ([4], 6)
    assert [bytes(tokens) for tokens, _ in SEQUENCES.records()] == [b"\1\2\3", b"\4", b"\7\10"]
    np.testing.assert_array_equal(SEQUENCES.lengths, [3, 1, 2])


def test_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        SEQUENCES.tokens[0] = 9


@pytest.mark.parametrize(
    "tokens, offsets, labels, message",
    [
        ([1, 2], [0, 1, 2], [0], "1 labels need"),
        ([1, 2], [0, 1], [0], "from 0 to the number of tokens, 2"),
        ([1, 2], [1, 2], [0], "from 0 to the number of tokens, 2"),
        ([1, 2], [0, 0, 2], [0, 0], "sequence 0 has no tokens"),
        ([1, 2], [0, 2, 1, 2], [0, 0, 0], "sequence 1 has no tokens"),
    ],
)
def test_arrays_must_belong_together(tokens, offsets, labels, message):
    with pytest.raises(ValueError, match=message):
        Sequences(np.array(tokens), offsets, labels)


def test_tokens_must_be_integers():
    with pytest.raises(TypeError, match="float64"):
        Sequences(np.ones(2), [0, 2], [0])
