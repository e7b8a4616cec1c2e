"""Compiling for every shape of batch, and batches on devices."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parallel.mesh import Devices
from experiments.training.batches import AHEAD, TrainBatches, ahead
from experiments.training.compilation import PerShape


def test_shapes_compiled_ahead_are_not_traced_again():
    traced = []

    def total(scale, batch):
        traced.append(batch["x"].shape)
        return scale * batch["x"].sum()

    step = PerShape(jax.jit(total))
    shapes = [(2, 3), (2, 5), (2, 3)]
    step.compile(2.0, batches=[{"x": jax.ShapeDtypeStruct(shape, jnp.float32)} for shape in shapes])
    assert traced == [(2, 3), (2, 5)]
    spent = step.compile_seconds
    assert spent > 0
    for shape in shapes:
        assert step(2.0, {"x": jnp.ones(shape)}) == 2 * np.prod(shape)
    assert len(traced) == 2
    assert step.compile_seconds == spent
    assert step(2.0, {"x": jnp.ones((1, 7))}) == 14
    assert traced[2:] == [(1, 7)]
    assert step.compile_seconds > spent


class Counting:
    """An iterator of numbered batches whose state is the next number."""

    def __init__(self, count):
        self._next, self._count = 0, count

    def __next__(self):
        if self._next == self._count:
            raise StopIteration
        self._next += 1
        return {"x": np.full((8, 1), self._next - 1)}

    def get_state(self):
        return {"next": self._next}

    def set_state(self, state):
        self._next = state["next"]


def test_the_position_is_that_of_the_batch_handed_out():
    devices = Devices(jax.devices()[:8])
    iterator = Counting(AHEAD + 4)
    batches = TrainBatches(iterator, devices)
    assert batches.position == {"next": 0}
    for number in range(3):
        batch = next(batches)
        assert batch["x"].sharding == devices.by_row
        assert int(batch["x"][0, 0]) == number
        assert batches.position == {"next": number + 1}
    assert iterator.get_state()["next"] > 3  # others are on their way
    again = TrainBatches(Counting(AHEAD + 4), devices, batches.position)
    assert [int(batch["x"][0, 0]) for batch in again] == list(range(3, AHEAD + 4))


def test_batches_ahead_keep_their_order():
    devices = Devices(jax.devices()[:1])
    for count in (0, 1, AHEAD + 3):
        batches = ({"x": np.full((2, 1), number)} for number in range(count))
        assert [int(batch["x"][0, 0]) for batch in ahead(batches, devices)] == list(range(count))
