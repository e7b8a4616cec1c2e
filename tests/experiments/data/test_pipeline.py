"""Iterators over batches: contents, hosts, exact resumption."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.bucketing import plan_epoch
from experiments.data.pipeline import eval_batches, train_iterator
from experiments.data.sequences import Sequences

BOUNDS = (8, 16, 31)
SETTINGS = dict(batch_size=6, bucket_bounds=BOUNDS, seed=3)


def make_source(count):
    """Sequence i has label i, so that batches say what they hold."""
    rng = np.random.default_rng(0)
    return Sequences.from_records(
        (rng.bytes(length), i) for i, length in enumerate(rng.integers(1, 32, count))
    )


SOURCE = make_source(100)


def assert_equal_batches(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def assert_holds_its_sequences(batch, source):
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "inputs": "int32",
        "segment_ids": "int32",
        "labels": "int32",
        "weight": "float32",
    }
    for row, segments, label in zip(batch["inputs"], batch["segment_ids"], batch["labels"], strict=True):
        tokens, _ = source[label]
        np.testing.assert_array_equal(row, np.pad(tokens, (0, len(row) - len(tokens))))
        np.testing.assert_array_equal(segments, np.arange(len(row)) < len(tokens))


def test_an_epoch_holds_what_the_plan_says():
    batches = list(train_iterator(SOURCE, **SETTINGS, epochs=2))
    assert len(batches) == 32
    for epoch in range(2):
        plan = plan_epoch(SOURCE.lengths, **SETTINGS, epoch=epoch)
        for batch, indices, width in zip(batches[16 * epoch :], plan.indices, plan.widths):
            assert_holds_its_sequences(batch, SOURCE)
            np.testing.assert_array_equal(batch["labels"], indices)
            assert batch["inputs"].shape == (6, width)
            np.testing.assert_array_equal(batch["weight"], np.ones(6))


def test_epochs_and_steps_are_the_same_stream():
    assert_equal_batches(
        train_iterator(SOURCE, **SETTINGS, num_steps=20),
        list(train_iterator(SOURCE, **SETTINGS, epochs=2))[:20],
    )


def test_without_bounds_the_longest_sequence_is_the_width():
    widths = {
        batch["inputs"].shape[1]
        for batch in train_iterator(SOURCE, batch_size=10, seed=0, epochs=1, prefetch=0)
    }
    assert widths == {SOURCE.lengths.max()}


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("other_prefetch", [0, 5])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 23, 39, 40])
def test_resumes_exactly(position, prefetch, other_prefetch):
    whole = list(train_iterator(SOURCE, **SETTINGS, num_steps=40))
    iterator = train_iterator(SOURCE, **SETTINGS, num_steps=40, prefetch=prefetch)
    for _ in range(position):
        next(iterator)
    state = iterator.get_state()
    assert state == {"next_index": position}
    resumed = train_iterator(SOURCE, **SETTINGS, num_steps=40, prefetch=other_prefetch)
    if position < 40:
        next(resumed)
    resumed.set_state(state)
    assert_equal_batches(resumed, whole[position:])
    iterator.set_state({"next_index": 7})
    assert_equal_batches(iterator, whole[7:])


@given(hosts=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 100))
def test_hosts_share_each_batch(hosts, seed):
    arguments = SETTINGS | dict(seed=seed)
    shards = [
        train_iterator(SOURCE, **arguments, epochs=1, host_index=host, host_count=hosts)
        for host in range(hosts)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_equal_batches(joined, train_iterator(SOURCE, **arguments, epochs=1))


@given(
    count=st.integers(1, 60),
    batch_size=st.sampled_from([1, 4, 6, 90]),
    bounds=st.sampled_from([None, BOUNDS, (31,)]),
    hosts=st.sampled_from([1, 2]),
)
def test_evaluation_counts_every_sequence_once(count, batch_size, bounds, hosts):
    source = make_source(count)
    if batch_size % hosts:
        hosts = 1
    shards = [
        eval_batches(source, batch_size=batch_size, bucket_bounds=bounds, host_index=host, host_count=hosts)
        for host in range(hosts)
    ]
    seen = []
    for parts in zip(*shards, strict=True):
        assert len({part["inputs"].shape for part in parts}) == 1
        for part in parts:
            assert_holds_its_sequences(part, source)  # rows of weight 0 too: none is empty
            assert len(part["labels"]) == batch_size // hosts
            assert set(part["weight"].tolist()) <= {0.0, 1.0}
            seen.extend(part["labels"][part["weight"] == 1].tolist())
    assert sorted(seen) == list(range(count))


def test_evaluation_can_be_repeated():
    batches = eval_batches(SOURCE, batch_size=30, bucket_bounds=BOUNDS)
    first = list(batches)
    assert len(first) == 4
    assert_equal_batches(batches, first)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(), "epochs or num_steps"),
        (dict(epochs=1, num_steps=1), "epochs or num_steps"),
        (dict(epochs=-1), "must not be negative"),
        (dict(epochs=1, batch_size=101), "larger than the data set of 100"),
        (dict(epochs=1, bucket_bounds=(8, 16)), "more than the last bucket bound 16"),
        (dict(epochs=1, bucket_bounds=(16, 8, 31)), "increase"),
        (dict(epochs=1, host_count=4), "host_count=4 must divide batch_size=6"),
        (dict(epochs=1, host_count=0), "host_count=0 must divide"),
        (dict(epochs=1, host_index=2, host_count=2), "host_index must be from 0 to 1, got 2"),
        (dict(epochs=1, prefetch=-1), "prefetch must not be negative"),
    ],
)
def test_impossible_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(SOURCE, **(SETTINGS | changes))
