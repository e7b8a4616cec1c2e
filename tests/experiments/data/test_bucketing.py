"""Plans of batches: every sequence once, full batches, little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.bucketing import choose_bucket_bounds, padding_fraction, plan_epoch, plan_evaluation

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=200).map(np.array)
bounds_sets = st.sets(st.integers(1, 39), max_size=5).map(lambda bounds: (*sorted(bounds), 40))


def least_bounds(lengths, plan, bounds):
    """The least bound that every batch fits."""
    bounds = bounds or (lengths.max(),)
    longest = [lengths[batch[batch >= 0]].max() for batch in plan.indices]
    return [min(bound for bound in bounds if bound >= length) for length in longest]


@given(
    lengths=lengths_lists,
    bounds=st.none() | bounds_sets,
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_training_batches(lengths, bounds, batch_size, seed):
    batch_size = min(batch_size, len(lengths))
    arguments = dict(batch_size=batch_size, bucket_bounds=bounds, seed=seed)
    for epoch in range(2):
        plan = plan_epoch(lengths, **arguments, epoch=epoch)
        assert plan.indices.shape == (len(lengths) // batch_size, batch_size)
        used = plan.indices.ravel()
        assert len(set(used.tolist())) == len(used)
        assert used.min() >= 0
        np.testing.assert_array_equal(plan.widths, least_bounds(lengths, plan, bounds))
        again = plan_epoch(lengths, **arguments, epoch=epoch)
        np.testing.assert_array_equal(plan.indices, again.indices)


@given(lengths=lengths_lists, bounds=st.none() | bounds_sets, batch_size=st.integers(1, 250))
def test_evaluation_batches(lengths, bounds, batch_size):
    plan = plan_evaluation(lengths, batch_size=batch_size, bucket_bounds=bounds)
    assert len(plan) == -(-len(lengths) // batch_size)
    np.testing.assert_array_equal(np.sort(plan.indices[plan.indices >= 0]), np.arange(len(lengths)))
    assert np.all(plan.indices[:-1] >= 0)
    assert np.all(plan.indices[:, 0] >= 0)
    np.testing.assert_array_equal(plan.widths, least_bounds(lengths, plan, bounds))


@given(lengths=lengths_lists, bounds=bounds_sets, batch_size=st.integers(1, 20))
def test_few_batches_mix_buckets(lengths, bounds, batch_size):
    plan = plan_evaluation(lengths, batch_size=batch_size, bucket_bounds=bounds)
    bucket = np.searchsorted(bounds, lengths)
    mixed = sum(len(set(bucket[batch[batch >= 0]].tolist())) > 1 for batch in plan.indices)
    assert mixed <= len(bounds) - 1


def test_long_range_arena_sizes():
    lengths = np.random.default_rng(0).integers(501, 2000, 96_000)
    bounds = (640, 768, 896, 1088, 1280, 1472, 1728, 2048)
    plans = [
        plan_epoch(lengths, batch_size=50, bucket_bounds=bounds, seed=0, epoch=epoch) for epoch in range(2)
    ]
    for plan in plans:
        assert len(plan) == 1920
        np.testing.assert_array_equal(np.sort(plan.indices.ravel()), np.arange(96_000))
        assert padding_fraction(lengths, plan) < 0.1
        # Batches of all widths in every part of the epoch.
        assert all(set(part.tolist()) == set(bounds) for part in np.split(plan.widths, 8))
    assert np.mean(plans[0].indices == plans[1].indices) < 0.01
    other = plan_epoch(lengths, batch_size=50, bucket_bounds=bounds, seed=1, epoch=0)
    assert np.mean(plans[0].indices == other.indices) < 0.01


def test_shuffle_does_not_change_with_the_version_of_numpy():
    plan = plan_epoch(
        np.array([3, 1, 2, 5, 4, 9, 7, 8]), batch_size=2, bucket_bounds=(4, 9), seed=11, epoch=5
    )
    assert plan.indices.tolist() == [[7, 6], [5, 3], [0, 2], [1, 4]]
    assert plan.widths.tolist() == [9, 9, 4, 4]


def test_what_sits_out_does_not_depend_on_length():
    lengths = np.repeat([10, 20, 30], [50, 50, 51])
    missing = []
    for epoch in range(300):
        plan = plan_epoch(lengths, batch_size=50, bucket_bounds=(10, 20, 30), seed=0, epoch=epoch)
        missing.extend(lengths[np.setdiff1d(np.arange(151), plan.indices)])
    assert len(missing) == 300
    assert min(missing.count(length) for length in (10, 20, 30)) > 70


def test_padding_fraction():
    lengths = np.array([2, 4, 10])
    plan = plan_evaluation(lengths, batch_size=2, bucket_bounds=(5, 10))
    assert padding_fraction(lengths, plan) == pytest.approx(1 - 16 / 30)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array),
    count=st.integers(1, 4),
    multiple=st.sampled_from([1, 7, 10]),
)
def test_chosen_bounds_are_the_best(lengths, count, multiple):
    def padded(bounds):
        return sum(min(bound for bound in bounds if bound >= length) for length in lengths)

    last = -(-lengths.max() // multiple) * multiple
    chosen = choose_bucket_bounds(lengths, count, multiple=multiple)
    assert list(chosen) == sorted(set(chosen))
    assert chosen[-1] == last
    assert len(chosen) <= count
    assert all(bound % multiple == 0 for bound in chosen)
    if multiple > 1:
        inner = range(multiple, last, multiple)
        every = itertools.chain.from_iterable(itertools.combinations(inner, k) for k in range(count))
        assert padded(chosen) == min(padded((*bounds, last)) for bounds in every)


@pytest.mark.parametrize(
    "bounds, message",
    [
        ((), "positive and increase"),
        ((5, 5, 10), "positive and increase"),
        ((10, 5), "positive and increase"),
        ((0, 10), "positive and increase"),
        ((5, 9), "sequence 2 has 10 tokens, more than the last bucket bound 9"),
    ],
)
def test_impossible_bounds(bounds, message):
    lengths = np.array([2, 4, 10])
    with pytest.raises(ValueError, match=message):
        plan_epoch(lengths, batch_size=2, bucket_bounds=bounds, seed=0, epoch=0)
    with pytest.raises(ValueError, match=message):
        plan_evaluation(lengths, batch_size=2, bucket_bounds=bounds)


def test_other_errors():
    lengths = np.array([2, 4, 10])
    with pytest.raises(TypeError, match="must be integers"):
        plan_evaluation(lengths, batch_size=2, bucket_bounds=(2.5, 10))
    with pytest.raises(ValueError, match="batch_size=4 is larger than the data set of 3"):
        plan_epoch(lengths, batch_size=4, bucket_bounds=None, seed=0, epoch=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        plan_evaluation(lengths, batch_size=0, bucket_bounds=None)
    with pytest.raises(ValueError, match="no sequences"):
        plan_evaluation(lengths[:0], batch_size=1, bucket_bounds=None)
    with pytest.raises(ValueError, match="count and multiple"):
        choose_bucket_bounds(lengths, 0)
