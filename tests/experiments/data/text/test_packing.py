"""Rows of documents: every prediction once, against literal loops."""

import itertools

import numpy as np
import pytest

from experiments.data.pipeline import IGNORE
from experiments.data.sequences import Sequences
from experiments.data.text.packing import best_fit, pack

END = 99


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    return Sequences(rng.integers(1, 90, offsets[-1]), offsets, np.zeros(len(lengths)))


def gathered(rows, width=None):
    return rows.gather(np.arange(len(rows)), width or int(rows.lengths.max()))


def predictions(batch):
    """Segments as lists of (input, label), in order of rows and columns."""
    real = batch["segment_ids"] if "segment_ids" in batch else np.ones_like(batch["inputs"])
    for inputs, labels, ids in zip(batch["inputs"], batch["labels"], real, strict=True):
        columns = list(zip(inputs.tolist(), labels.tolist(), ids.tolist(), strict=True))
        for _, piece in itertools.groupby(columns, key=lambda column: column[2]):
            yield list(piece)


def pairs_of(source):
    """Every token of every document with the next, the end token after the last."""
    texts = [[*source[index][0].tolist(), END] for index in range(len(source))]
    return sorted(pair for text in texts for pair in itertools.pairwise(text))


def literal_best_fit(sizes, length):
    rows = []
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        spaces = [length - sum(sizes[other] for other in row) for row in rows]
        fitting = [space for space in spaces if space >= sizes[piece]]
        if fitting:
            rows[spaces.index(min(fitting))].append(piece)
        else:
            rows.append([piece])
    return rows, [sum(sizes[piece] for piece in row) for row in rows]


@pytest.mark.parametrize("length", [5, 16])
@pytest.mark.parametrize("seed", range(4))
def test_best_fit_is_the_literal_one(length, seed):
    sizes = np.random.default_rng(seed).integers(1, length + 1, 60)
    rows, fullness = literal_best_fit(sizes.tolist(), length)
    found = best_fit(sizes, length)
    # Among rows of equal space any one may be taken.
    assert sorted(int(sizes[row].sum()) for row in found) == sorted(fullness)
    assert len(found) == len(rows)
    assert sorted(itertools.chain(*found)) == list(range(60))


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("lengths", [(3, 9, 1, 8, 17, 2), (40,), (8, 8, 8), (1,) * 20])
def test_every_token_predicts_the_next_of_its_document_once(packing, lengths):
    source = documents(lengths)
    rows = pack(source, END, packing=packing, length=8)
    batch = gathered(rows)
    found = [
        (token, label)
        for piece in predictions(batch)
        for token, label, segment in piece
        if segment and label != IGNORE
    ]
    assert sorted(found) == pairs_of(source)
    for piece in predictions(batch):
        follows = [label for _, label, segment in piece[:-1] if segment and label != IGNORE]
        inputs = [token for token, _, segment in piece[1:] if segment]
        assert follows == inputs[len(inputs) - len(follows) :]
    assert batch["segment_ids"].max() == rows.segments
    assert (batch["segment_ids"] > 0).sum(axis=1).tolist() == rows.lengths.tolist()


@pytest.mark.parametrize("lengths", [(3, 9, 1, 8, 17, 2), (30,)])
def test_joined_documents_are_one_text(lengths):
    source = documents(lengths)
    batch = gathered(pack(source, END, packing="concatenate", length=8, reset=False))
    assert set(batch) == {"inputs", "labels"}
    text = list(itertools.chain(*([*source[index][0].tolist(), END] for index in range(len(source)))))
    counted = batch["labels"] != IGNORE
    assert batch["inputs"][counted].tolist() == text[:-1]
    assert batch["labels"][counted].tolist() == text[1:]
    assert (batch["inputs"][:, 1:] == batch["labels"][:, :-1])[counted[:, :-1]].all()


@pytest.mark.parametrize(
    "packing, reset", [("best_fit", True), ("concatenate", True), ("concatenate", False)]
)
def test_padding_stands_at_the_ends(packing, reset):
    batch = gathered(pack(documents((3, 9, 2)), END, packing=packing, length=5, reset=reset), width=9)
    padding = batch["segment_ids"] == 0
    assert padding.any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert (np.diff(batch["segment_ids"], axis=1)[~padding[:, 1:]] >= 0).all()
    assert (batch["labels"][padding] == IGNORE).all()
    assert (batch["inputs"][padding] == 0).all()


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_rows_are_counted_and_thinned_evenly(packing):
    source = documents((7, 30, 12, 5, 41))
    rows = pack(source, END, packing=packing, length=6)
    few = pack(source, END, packing=packing, length=6, most=4)
    assert len(few) == 4
    kept = rows.gather(np.arange(4) * len(rows) // 4, 6)
    assert all(np.array_equal(array, kept[name]) for name, array in gathered(few, 6).items())
    labels = gathered(rows)["labels"]
    expected = np.bincount(labels[labels != IGNORE], minlength=100)
    np.testing.assert_array_equal(rows.label_counts(100), expected)


def test_refusals():
    source = documents((3, 4))
    with pytest.raises(ValueError, match="packing='best'; expected one of concatenate, best_fit"):
        pack(source, END, packing="best", length=4)
    with pytest.raises(ValueError, match="packing='best_fit' with reset=False"):
        pack(source, END, packing="best_fit", length=4, reset=False)
    with pytest.raises(ValueError, match="length=9, but all documents together have 8 tokens"):
        pack(source, END, packing="concatenate", length=9)
    with pytest.raises(ValueError, match="a row of 4 tokens does not fit into a width of 3"):
        pack(source, END, packing="best_fit", length=4).gather(np.array([0]), 3)
