"""Assignment of sequences to batches, in buckets of similar length, so that little padding is computed.

A plan depends only on the lengths, the seed and the epoch, so any batch of any epoch can be made without the earlier
ones. Shuffles sort the raw output of the Philox generator, which NumPy promises not to change.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of one pass over a data set.

    Attributes:
      indices: sequences per batch, int64 (n, batch_size); -1 where a batch has too few.
      widths: length that each batch is padded to, int64 (n,): the smallest bound that its sequences fit.
    """

    indices: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int:
        return len(self.widths)


def check_bucket_bounds(lengths: np.ndarray, bucket_bounds: Sequence[int] | None) -> np.ndarray:
    """Returns the bounds as an array; if None, the longest length is the only one.

    Raises:
      ValueError: if there is no sequence, the bounds do not increase, or a sequence is longer than the last.
    """
    if len(lengths) == 0:
        raise ValueError("the data set has no sequences")
    if bucket_bounds is None:
        return np.array([lengths.max()], np.int64)
    if isinstance(bucket_bounds, str) or not all(
        isinstance(bound, int | np.integer) for bound in bucket_bounds
    ):
        raise TypeError(f"bucket_bounds must be integers, got {bucket_bounds!r}")
    bounds = np.array(bucket_bounds, np.int64)
    if len(bounds) == 0 or bounds[0] < 1 or np.any(np.diff(bounds) < 1):
        raise ValueError(f"bucket_bounds must be positive and increase, got {tuple(bucket_bounds)}")
    if lengths.max() > bounds[-1]:
        raise ValueError(
            f"sequence {int(np.argmax(lengths))} has {lengths.max()} tokens, more than the last bucket bound "
            f"{bounds[-1]}; make that bound {lengths.max()} or more"
        )
    return bounds


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless a batch has at least one sequence."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def count_train_batches(count: int, batch_size: int) -> int:
    """Returns the number of batches per epoch over `count` sequences; all are full.

    Raises:
      ValueError: if a batch is larger than the data set.
    """
    check_batch_size(batch_size)
    if batch_size > count:
        raise ValueError(f"batch_size={batch_size} is larger than the data set of {count} sequences")
    return count // batch_size


def plan_epoch(
    lengths: np.ndarray,
    *,
    batch_size: int,
    bucket_bounds: Sequence[int] | None,
    seed: int,
    epoch: int,
) -> Plan:
    """Returns full batches with each sequence at most once, in random order.

    The sequences are shuffled and fill the bucket of their length in that order; every `batch_size` of them make a
    batch. The remaining sequences of a bucket move to the next larger one. Finally the batches are shuffled. If
    `batch_size` does not divide the number of sequences, the end of the shuffled order is left out of this epoch,
    whatever its lengths.
    """
    bounds = check_bucket_bounds(lengths, bucket_bounds)
    batches = count_train_batches(len(lengths), batch_size)
    order = shuffled(len(lengths), seed, epoch, 0)[: batches * batch_size]
    plan = _fill_buckets(lengths, order, bounds, batch_size)
    order = shuffled(batches, seed, epoch, 1)
    return Plan(plan.indices[order], plan.widths[order])


def plan_evaluation(lengths: np.ndarray, *, batch_size: int, bucket_bounds: Sequence[int] | None) -> Plan:
    """Returns ceil(n / batch_size) batches with each sequence once, from short to long; the last may not be full."""
    bounds = check_bucket_bounds(lengths, bucket_bounds)
    check_batch_size(batch_size)
    return _fill_buckets(lengths, np.arange(len(lengths)), bounds, batch_size)


def shuffled(count: int, *entropy: int) -> np.ndarray:
    """Returns the numbers from 0 to `count` - 1 in the random order of some integers."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count), kind="stable")


def uniforms(count: int, *entropy: int) -> np.ndarray:
    """Returns random numbers of [0, 1), of some integers."""
    raw = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def _fill_buckets(lengths: np.ndarray, order: np.ndarray, bounds: np.ndarray, batch_size: int) -> Plan:
    bucket_of = np.searchsorted(bounds, lengths[order])
    batches = []
    left_over = order[:0]
    for bucket in range(len(bounds)):
        waiting = np.concatenate([order[bucket_of == bucket], left_over])
        full = len(waiting) // batch_size * batch_size
        batches.append(waiting[:full].reshape(-1, batch_size))
        left_over = waiting[full:]
    if len(left_over):
        batches.append(np.pad(left_over, (0, batch_size - len(left_over)), constant_values=-1)[None])
    indices = np.concatenate(batches)
    longest = np.where(indices >= 0, lengths[indices], 0).max(axis=1)
    return Plan(indices, bounds[np.searchsorted(bounds, longest)])


def padding_fraction(lengths: np.ndarray, plan: Plan) -> float:
    """Returns the fraction of positions of all batches that hold no token."""
    positions = plan.widths.sum() * plan.indices.shape[1]
    return float(1 - lengths[plan.indices[plan.indices >= 0]].sum() / positions)


def choose_bucket_bounds(lengths: np.ndarray, count: int, *, multiple: int = 64) -> tuple[int, ...]:
    """Returns the at most `count` bounds, multiples of `multiple`, that minimize the padding of these lengths.

    Dynamic programming over the last bound: padding to b the lengths in (a, b] costs b for each, and the best choice
    of j bounds ending in b extends the best choice of j - 1 bounds ending in some a < b.
    """
    if count < 1 or multiple < 1:
        raise ValueError(f"count and multiple must be at least 1, got {count} and {multiple}")
    check_bucket_bounds(lengths, None)
    candidates = np.arange(0, lengths.max() + multiple, multiple)
    within = np.searchsorted(np.sort(lengths), candidates, side="right")  # lengths up to each candidate
    cost = candidates * (within - within[:, None]).astype(np.float64)  # cost[a, b]
    cost[np.tril_indices(len(candidates))] = np.inf
    best = np.where(np.arange(len(candidates)) == 0, 0.0, np.inf)
    previous = []
    for _ in range(min(count, len(candidates) - 1)):
        totals = best[:, None] + cost
        previous.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    path = [len(candidates) - 1]
    for step in reversed(previous[1:]):
        path.append(int(step[path[-1]]))
    return tuple(int(candidates[index]) for index in reversed(path))
