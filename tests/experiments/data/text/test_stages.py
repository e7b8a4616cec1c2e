"""Stages of training on longer and longer rows."""

import numpy as np
import pytest

from experiments.data.bucketing import plan_epoch
from experiments.data.pipeline import eval_batches, train_iterator
from experiments.data.text.packing import pack
from experiments.data.text.stages import Staged, check_stages
from tests.experiments.data.text.test_packing import END, documents

STAGES = ((4, 9), (8, 5))
SOURCE = documents((30, 61, 8, 3, 40))


def made(packing="concatenate"):
    parts = {length: pack(SOURCE, END, packing=packing, length=length) for length in (4, 8, 16)}
    return Staged(parts, STAGES)


def batches(source, **options):
    return list(train_iterator(source, **dict(batch_size=2, seed=3, num_steps=24, prefetch=0) | options))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_stage_trains_on_its_rows(packing):
    source = made(packing)
    found = batches(source)
    assert [batch["inputs"].shape for batch in found] == [(8, 4)] * 9 + [(4, 8)] * 5 + [(2, 16)] * 10
    start = 0
    for length, steps in (*STAGES, (16, 10)):
        rows = pack(SOURCE, END, packing=packing, length=length)
        size, per_epoch = 32 // length, len(rows) // (32 // length)
        for step in range(steps):
            epoch, number = divmod(step, per_epoch)
            plan = plan_epoch(rows.lengths, batch_size=size, bucket_bounds=None, seed=3, epoch=epoch)
            for name, array in rows.gather(plan.indices[number], length).items():
                np.testing.assert_array_equal(found[start + step][name], array)
        start += steps
    assert source.train_batches(2) == len(pack(SOURCE, END, packing=packing, length=16)) // 2


def test_hosts_and_resumption():
    source, whole = made(), batches(made())
    parts = [batches(source, host_index=host, host_count=2) for host in (0, 1)]
    for batch, one, other in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([one[name], other[name]]))
    for step in (4, 9, 17):
        iterator = train_iterator(source, batch_size=2, seed=3, num_steps=24, prefetch=0)
        iterator.set_state({"next_index": step} if isinstance(iterator.get_state(), dict) else step)
        rest = list(iterator)
        assert len(rest) == 24 - step
        for batch, expected in zip(rest, whole[step:], strict=True):
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)


def test_evaluations_see_full_rows():
    full = pack(SOURCE, END, packing="concatenate", length=16)
    for batch, expected in zip(
        eval_batches(made(), batch_size=2), eval_batches(full, batch_size=2), strict=True
    ):
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "stages, error, message",
    [
        ((4, 8), ValueError, r"stages has 4; expected pairs \(length of rows, number of steps\)"),
        (((4, 0),), ValueError, r"steps of the stage \(4, 0\)"),
        (((4.0, 1),), TypeError, r"length of the stage \(4\.0, 1\)"),
        (((16, 1),), ValueError, "with length=16; expected lengths that increase, are less than 16"),
        (((8, 1), (4, 1)), ValueError, "expected lengths that increase"),
        (((5, 1),), ValueError, "and divide it"),
    ],
)
def test_refusals(stages, error, message):
    with pytest.raises(error, match=message):
        check_stages(stages, 16)


def test_batches_are_not_larger_than_a_stage():
    with pytest.raises(ValueError, match="a batch of 40 rows of 4 tokens is larger than the data set"):
        made().train_batches(10)
    with pytest.raises(ValueError, match=r"data.bucket_bounds=\(16,\), but the task chooses the widths"):
        batches(made(), bucket_bounds=(16,))
