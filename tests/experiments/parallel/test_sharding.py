"""Meshes and the rules by which they divide arrays."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.config.loading import MeshConfig
from experiments.parallel.mesh import Devices, axis_sizes
from layers.sharding import MESH_AXES
from layers.sharding_rules import ShardingRules


def mesh(**sizes):
    return Devices(sizes=MeshConfig(**sizes)).mesh


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"tensor": 2, "fsdp": -1}, (1, 4, 2, 1, 1)),
        ({"tensor": 2}, (4, 1, 2, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1, 1)),
    ],
)
def test_an_axis_takes_the_devices_that_are_left(sizes, expected):
    assert tuple(axis_sizes(MeshConfig(**sizes), 8).values()) == expected
    assert mesh(**sizes).axis_names == MESH_AXES


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsdp": 16}, "mesh: fsdp=16 takes 16 devices, and there are 8"),
        ({"tensor": 3}, "mesh: tensor=3 takes 3 devices or a multiple, and there are 8.*--num_devices=6"),
        ({"data": 2, "fsdp": 2}, "mesh: data=2, fsdp=2 takes 4 devices, and there are 8.*--num_devices=8"),
        ({"data": -1, "fsdp": -1}, "mesh.data and mesh.fsdp are -1; only one"),
        ({"tensor": 0}, "mesh.tensor=0; expected at least 1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        axis_sizes(MeshConfig(**sizes), 8)


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("embed", "heads"), (64, 96), P("fsdp", "tensor")),
        (("layer", "heads", "embed"), (3, 96, 64), P(None, "tensor", "fsdp")),
        (("embed",), (64,), P(None)),  # small
        ((None, "embed"), (99, 64), P(None, "fsdp")),
        (("vocab", "embed"), (501, 64), P(None, "fsdp")),  # an axis that its mesh axis does not divide
        ((None, None), (128, 64), P("fsdp", None)),  # the largest that is free
        (("layer", None, "state"), (4, 63, 128), P(None, None, "fsdp")),
        (("heads", None), (96, 63), P("tensor", None)),
    ],
)
def test_logical_axes_become_mesh_axes(axes, shape, expected):
    rules = ShardingRules(smallest=1000)
    assert rules.spec(axes, shape, mesh(tensor=2, fsdp=4)) == expected


def test_one_device_divides_nothing():
    one = Devices(jax.devices()[:1])
    assert one.rules.spec(("embed", "heads"), (128, 128), one.mesh) == P(None, None)
    assert one.describe().startswith("1 x ")


def test_rows_and_heads_that_an_axis_does_not_divide_are_named():
    devices = Devices(sizes=MeshConfig(tensor=2, fsdp=4))
    with pytest.raises(
        ValueError, match=r"train.batch_size=6 cannot be divided over 4 parts \(data=1 x fsdp=4\)"
    ):
        devices.check_rows("train.batch_size", 6)

    class Options:
        heads, kv_heads = 6, 3

    with pytest.raises(
        ValueError, match=r"blocks/0/mixer has kv_heads=3, which the mesh axis tensor=2 does not"
    ):
        devices.check_heads("blocks/0/mixer", Options())


def test_a_batch_lies_in_rows():
    devices = Devices(sizes=MeshConfig(tensor=2, fsdp=4))
    batch = devices.put_batch({"inputs": np.arange(24).reshape(8, 3)})
    shards = {shard.data.shape for shard in batch["inputs"].addressable_shards}
    assert shards == {(2, 3)}
