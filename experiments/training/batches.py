"""Batches on the devices, copied ahead of their use, with the position in the data of each."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from experiments.parallel.mesh import Devices
from layers.typing import Array

AHEAD = 2


class TrainBatches:
    """Training batches on the devices.

    Attributes:
      position: state of the iterator after the last batch returned, as JSON.
    """

    def __init__(
        self,
        iterator: Any,
        devices: Devices,
        position: Any = None,
        teacher: Callable[[Any], dict[str, Array]] | None = None,
    ):
        """Resumes from the `position` of an earlier object, or starts at the start of the iterator.

        Args:
          iterator: iterator over batches of NumPy arrays, with `get_state` and `set_state`.
          teacher: reads each batch on the devices, and returns it with what it adds.
        """
        if position is not None:
            iterator.set_state(position)
        self.position = iterator.get_state()
        self._iterator, self._devices, self._teacher = iterator, devices, teacher
        self._waiting: deque[tuple[dict[str, Array], Any]] = deque()

    def __next__(self) -> dict[str, Array]:
        while len(self._waiting) < AHEAD:
            try:
                batch = self._devices.put_batch(next(self._iterator))
            except StopIteration:
                break
            self._waiting.append((batch, self._iterator.get_state()))
        if not self._waiting:
            raise StopIteration
        batch, self.position = self._waiting.popleft()
        return batch if self._teacher is None else self._teacher(batch)

    def __iter__(self) -> "TrainBatches":
        return self


def ahead(batches: Iterable[Any], devices: Devices) -> Iterator[dict[str, Array]]:
    """Yields the batches in order, on the devices."""
    waiting: deque[dict[str, Array]] = deque()
    for batch in batches:
        waiting.append(devices.put_batch(batch))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting
