"""Rows of single documents by powers of two, and the order of their batches."""

import itertools

import numpy as np
import pytest

from experiments.data.pipeline import IGNORE, train_iterator
from experiments.data.text.decomposition import Decomposed
from experiments.data.text.packing import pack
from tests.experiments.data.text.test_packing import END, documents

LENGTHS = (*range(1, 40), 100, 131, 64, 200)


def made(lengths=LENGTHS, **options):
    return Decomposed(documents(lengths), END, **dict(length=16, shortest=4) | options)


def row(rows, index):
    width = int(rows.lengths[index])
    batch = rows.gather(np.array([index]), width)
    return batch["inputs"][0].tolist(), batch["labels"][0].tolist()


def test_rows_follow_each_other_in_their_documents():
    source, rows = documents(LENGTHS), made()
    found, dropped = 0, 0
    for index in range(len(source)):
        text = [*source[index][0].tolist(), END]
        place = 0
        while (left := len(text) - 1 - place) >= 4:
            inputs, labels = row(rows, found)
            size = len(inputs)
            assert inputs == text[place : place + size]
            assert labels == text[place + 1 : place + size + 1]
            # The largest power of two that fits, or any of them if that is longer than a row.
            assert size in (4, 8, 16) if left >= 32 else size == min(16, 2 ** int(np.log2(left)))
            found, place = found + 1, place + size
        dropped += left
    assert found == len(rows)
    assert rows.dropped == dropped
    assert rows.summary() == dict(
        rows={str(size): int((rows.lengths == size).sum()) for size in (4, 8, 16)}, dropped=dropped
    )


def test_long_documents_give_every_length_as_many_tokens():
    lengths = made((60_000,)).lengths
    tokens = [size * (lengths == size).sum() for size in (4, 8, 16)]
    np.testing.assert_allclose(tokens, 20_000, rtol=0.05)


def batches_of(rows, epoch=0, **options):
    settings = dict(batch_size=2, seed=5) | options
    choose, per_epoch = rows.schedule(**settings), rows.train_batches(settings["batch_size"])
    return [choose(epoch * per_epoch + step) for step in range(per_epoch)]


@pytest.mark.parametrize("curriculum", ["grow_p2", "grow_linear", "uniform"])
def test_batches_of_an_epoch(curriculum):
    rows = made((4000, 300, 17, 9), curriculum=curriculum, cycles=3)
    chosen = batches_of(rows)
    assert all(len(indices) * width == 2 * 16 for indices, width in chosen)
    assert all((rows.lengths[indices] == width).all() for indices, width in chosen)
    used = np.concatenate([indices for indices, _ in chosen])
    assert len(np.unique(used)) == len(used) > 0.95 * len(rows)
    widths = np.array([width for _, width in chosen])
    counts = {width: (widths == width).sum() for width in rows.widths}
    assert counts == {width: (rows.lengths == width).sum() // (32 // width) for width in rows.widths}
    # Every cycle has its third of each length.
    place = 0
    for cycle in range(3):
        due = {n: (cycle + 1) * count // 3 - cycle * count // 3 for n, count in counts.items()}
        here = widths[place : place + sum(due.values())]
        assert {n: (here == n).sum() for n in due} == due
        place += len(here)
    again = batches_of(made((4000, 300, 17, 9), curriculum=curriculum, cycles=3))
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(chosen, again, strict=True))
    for other in (batches_of(rows, epoch=1), batches_of(rows, seed=6)):
        assert [width for _, width in other] != widths.tolist()
        assert sorted(width for _, width in other) == sorted(widths.tolist())


def test_curricula_begin_with_short_rows():
    found = {}
    for curriculum, share in (("grow_p2", 4 / 7), ("grow_linear", 3 / 6), ("uniform", 1 / 3)):
        # All lengths have about as many batches; the first ones are drawn by the odds alone.
        rows = made((100_000,), curriculum=curriculum, cycles=1)
        widths = np.array([width for _, width in batches_of(rows)])
        found[curriculum] = np.mean(widths[:300] == 4)
        assert abs(found[curriculum] - share) < 0.09
        assert (np.mean(widths[-300:] == 4) < 0.1) == (curriculum != "uniform")
        # The odds count the batches that are left, so that they change as short ones become few.
        assert np.mean(widths[len(widths) * 3 // 10 : len(widths) // 2] == 4) < 0.5
    assert found["grow_p2"] > found["grow_linear"] > found["uniform"]


def test_hosts_and_resumption():
    rows = made()
    settings = dict(batch_size=4, seed=1, epochs=2, prefetch=0)
    whole = list(train_iterator(rows, **settings))
    assert len(whole) == 2 * rows.train_batches(4)
    assert {batch["inputs"].shape for batch in whole} == {(16, 4), (8, 8), (4, 16)}
    assert all((batch["weight"] == 1).all() for batch in whole)
    # Whole rows come without ids, but for those that others are padded to.
    assert all(("segment_ids" in batch) == (batch["inputs"].shape[1] == 16) for batch in whole)
    parts = [list(train_iterator(rows, **settings, host_index=host, host_count=2)) for host in (0, 1)]
    for batch, one, other in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([one[name], other[name]]))
    for step in (1, len(whole) // 2 + 1):
        before = train_iterator(rows, **settings)
        for _ in range(step):
            next(before)
        after = train_iterator(rows, **settings)
        after.set_state(before.get_state())
        for batch, expected in itertools.zip_longest(after, whole[step:]):
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)


def test_outside_training_rows_are_padded():
    rows = made()
    batch = rows.gather(np.arange(len(rows)), 16)
    assert (batch["segment_ids"].sum(1) == rows.lengths).all()
    assert ((batch["labels"] == IGNORE) == (batch["segment_ids"] == 0)).all()
    counts = np.bincount(batch["labels"][batch["segment_ids"] == 1], minlength=100)
    np.testing.assert_array_equal(rows.label_counts(100), counts)
    with pytest.raises(ValueError, match="rows of 4 to 16 tokens do not fit into a width of 8"):
        rows.gather(np.arange(len(rows)), 8)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=12), "length=12 with packing='decompose'; expected a power of two"),
        (dict(shortest=3), "shortest=3 with packing='decompose'; expected a power of two"),
        (dict(shortest=32), "shortest=32 is longer than length=16"),
        (dict(curriculum="grow"), "curriculum='grow'; expected one of grow_p2, grow_linear, uniform"),
        (dict(lengths=(5, 9)), "no document gives a row of so many tokens; the longest predicts 9"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_batches_that_no_length_fills_are_refused():
    with pytest.raises(ValueError, match="batch_size=1000: no length of packing='decompose' has rows"):
        made().train_batches(1000)
    # Other packings choose nothing.
    assert not hasattr(pack(documents((9, 9)), END, packing="best_fit", length=4), "schedule")
