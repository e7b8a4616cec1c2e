"""Batches for training and evaluation, through Grain.

A batch is a dict of the source's arrays and weight float32 (b,): 1, or 0 for a row that only fills the last batch of an
evaluation. Such a row repeats a sequence of its batch, so that a model never sees a row without tokens. Sources gather
inputs int32 (b, t), labels int32 (b,) or (b, t), and segment_ids int32 (b, t; 1 for tokens, 0 for padding) unless all
rows of this width are whole. Where a label belongs to a pair of sequences, inputs and segment_ids are (b, 2, t).

The batch of step n is computed from n (see `bucketing`), so the state of an iterator is one number, and setting it
resumes bit for bit without reading earlier batches.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import grain
import numpy as np

from experiments.data.bucketing import (
    Plan,
    check_bucket_bounds,
    count_train_batches,
    plan_epoch,
    plan_evaluation,
)
from experiments.data.schedules import Choice, Scheduled
from layers.indices import check_indices

Batch = dict[str, np.ndarray]
IGNORE = -1  # label of a position with nothing to predict


class Source(Protocol):
    """A split of a data set: `sequences.Sequences`, or any object with these members."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns the examples at `indices`, padded to `width`: arrays with one row per example.

        The names of the arrays depend only on the width.
        """
        ...


def train_iterator(
    source: Source,
    *,
    batch_size: int,
    bucket_bounds: Sequence[int] | None = None,
    seed: int,
    epochs: int | None = None,
    num_steps: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    prefetch: int = 8,
    sizes: Mapping[str, int] | None = None,
) -> grain.DatasetIterator:
    """Returns an iterator over full batches of `epochs` shuffled epochs, or of `num_steps` steps (`bucketing.plan_epoch`).

    A source that is `Scheduled` chooses the batches itself.

    Its `get_state()` is the number of the next batch, and `set_state` resumes exactly.

    Args:
      batch_size: number of sequences per batch, over all hosts.
      bucket_bounds: widths that batches are padded to, increasing; None pads all to the longest sequence.
      seed: seed of the shuffles.
      host_index: index of the part to yield, out of `host_count` equal parts of each batch: rows `host_index * b` to
        `(host_index + 1) * b`, with b = rows / host_count. All hosts see the same widths.
      prefetch: number of batches made ahead in a background thread; 0 makes them on request.
      sizes: "vocab_size" and "num_classes" of the model, which token ids and labels are checked against.

    Raises:
      ValueError: if both or neither of `epochs` and `num_steps` are given, a batch is larger than the data set, a
        sequence is longer than the last bound, the bounds do not increase or `host_count` does not divide
        `batch_size`.
    """
    if (epochs is None) == (num_steps is None):
        raise ValueError(
            f"give epochs or num_steps, one of them; got epochs={epochs} and num_steps={num_steps}"
        )
    per_epoch = train_batches(source, batch_size)
    steps = num_steps if num_steps is not None else epochs * per_epoch
    if steps < 0:
        raise ValueError(
            f"epochs and num_steps must not be negative, got epochs={epochs}, num_steps={num_steps}"
        )
    _host_rows(batch_size, host_index, host_count)
    check_widths(source, bucket_bounds)
    if isinstance(source, Scheduled):
        choose = source.schedule(batch_size=batch_size, seed=seed)
    else:
        choose = _by_length(source, batch_size, bucket_bounds, seed, per_epoch)

    def make(step: int) -> Batch:
        indices, width = choose(step)
        rows = _host_rows(len(indices), host_index, host_count)
        return _assemble(source, indices, width, rows, sizes)

    return iter(_dataset(make, steps, prefetch))


def train_batches(source: Source, batch_size: int) -> int:
    """Returns the number of batches of an epoch of training.

    Raises:
      ValueError: if a batch is larger than the data set.
    """
    if isinstance(source, Scheduled):
        return source.train_batches(batch_size)
    return count_train_batches(len(source), batch_size)


def check_widths(source: Source, bucket_bounds: Sequence[int] | None) -> None:
    """Raises ValueError unless the rows of a source fit the buckets; those of a `Scheduled` source take none."""
    check_bucket_bounds(source.lengths, bucket_bounds)
    if bucket_bounds is not None and isinstance(source, Scheduled):
        raise ValueError(
            f"data.bucket_bounds={tuple(bucket_bounds)}, but the task chooses the widths of training batches, "
            f"{', '.join(map(str, source.widths))}; expected None"
        )


def example_train_batches(
    source: Source, batch_size: int, bucket_bounds: Sequence[int] | None
) -> list[Batch]:
    """Returns one batch per width that training batches can have."""
    if not isinstance(source, Scheduled):
        return example_batches(source, batch_size, bucket_bounds)
    return [
        _example(source, source.example(width), source.rows(batch_size, width), width)
        for width in source.widths
    ]


def example_batches(source: Source, batch_size: int, bucket_bounds: Sequence[int] | None) -> list[Batch]:
    """Returns one batch per width that batches of an evaluation can have."""
    bounds = check_bucket_bounds(source.lengths, bucket_bounds)
    widths = bounds[np.unique(np.searchsorted(bounds, source.lengths))]
    return [_example(source, int(np.argmin(source.lengths)), batch_size, int(width)) for width in widths]


def _example(source: Source, index: int, rows: int, width: int) -> Batch:
    return source.gather(np.full(rows, index), width) | {"weight": np.ones(rows, np.float32)}


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    bucket_bounds: Sequence[int] | None = None,
    host_index: int = 0,
    host_count: int = 1,
    prefetch: int = 8,
    sizes: Mapping[str, int] | None = None,
) -> grain.IterDataset:
    """Returns ceil(n / batch_size) batches with each sequence once with weight 1; can be iterated repeatedly.

    The batches are the same every time. The last one is filled with rows of weight 0; all hosts get the same number of
    batches. Arguments and errors are those of `train_iterator`, except that a batch may be larger than the data set.
    """
    rows = _host_rows(batch_size, host_index, host_count)
    plan = plan_evaluation(source.lengths, batch_size=batch_size, bucket_bounds=bucket_bounds)

    def make(number: int) -> Batch:
        return _assemble(source, plan.indices[number], int(plan.widths[number]), rows, sizes)

    return _dataset(make, len(plan), prefetch)


def _by_length(
    source: Source, batch_size: int, bucket_bounds: Sequence[int] | None, seed: int, per_epoch: int
) -> Choice:
    """Returns the schedule of `bucketing.plan_epoch`."""

    @functools.lru_cache(maxsize=2)  # at the turn of an epoch both plans are in use
    def plan(epoch: int) -> Plan:
        return plan_epoch(
            source.lengths, batch_size=batch_size, bucket_bounds=bucket_bounds, seed=seed, epoch=epoch
        )

    def choose(step: int) -> tuple[np.ndarray, int]:
        epoch, number = divmod(step, per_epoch)
        return plan(epoch).indices[number], int(plan(epoch).widths[number])

    return choose


def _host_rows(batch_size: int, host_index: int, host_count: int) -> slice:
    if host_count < 1 or batch_size % host_count:
        raise ValueError(f"host_count={host_count} must divide batch_size={batch_size}")
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index must be from 0 to {host_count - 1}, got {host_index}")
    share = batch_size // host_count
    return slice(host_index * share, (host_index + 1) * share)


def check_batch(batch: Batch, sizes: Mapping[str, int]) -> None:
    """Raises ValueError if a token id or a label of a batch is out of range; names the first one and its place.

    Args:
      sizes: "vocab_size" for token ids and labels of positions, "num_classes" for labels of sequences; others are free.
    """
    inputs, labels, segment_ids = batch["inputs"], batch.get("labels"), batch.get("segment_ids")
    real = None if segment_ids is None else segment_ids != 0
    if "vocab_size" in sizes and np.issubdtype(inputs.dtype, np.integer):
        check_indices("inputs", inputs, sizes["vocab_size"], counted=real, of="vocab_size")
    if labels is None:
        return
    if labels.ndim == 1 and "num_classes" in sizes:
        check_indices("labels", labels, sizes["num_classes"], of="num_classes")
    if labels.ndim == 2 and "vocab_size" in sizes:
        check_indices("labels", labels, sizes["vocab_size"], counted=labels != IGNORE, of="vocab_size")


def _assemble(
    source: Source, indices: np.ndarray, width: int, rows: slice, sizes: Mapping[str, int] | None
) -> Batch:
    mine = indices[rows]
    batch = source.gather(np.where(mine >= 0, mine, indices[0]), width)
    check_batch(batch, sizes or {})
    return batch | {"weight": (mine >= 0).astype(np.float32)}


class _Batches:
    """Grain's random-access source over the numbers of batches."""

    def __init__(self, make: Callable[[int], Batch], count: int):
        self._make = make
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        return self._make(int(number))


def _dataset(make: Callable[[int], Batch], count: int, prefetch: int) -> grain.IterDataset:
    if prefetch < 0:
        raise ValueError(f"prefetch must not be negative, got {prefetch}")
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return grain.MapDataset.source(_Batches(make, count)).to_iter_dataset(options)
