"""What loading costs, where tensors go, and names that a hub knows."""

import json
import os
import stat
import sys
import tracemalloc
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from layers.sharding import MESH_AXES
from layers.sharding_rules import ShardingRules
from seqmodels import load_pretrained
from seqmodels.config import parse
from seqmodels.interop import files, loading
from seqmodels.interop.tensors import make_table

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A checkpoint of 3 MB in Llama's shape."""
    folder = tmp_path_factory.mktemp("larger")
    config = json.loads((DATA / "llama" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 2048, "num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(config))
    family = loading.family_of(config, folder)
    own = loading.load_config(folder)
    shapes = make_table(family, parse(own), loading.shapes_of(own)).shapes
    draw = np.random.default_rng(0)
    made = ((name, draw.normal(size=shape).astype(np.float32)) for name, shape in shapes.items())
    files.write_tensors(folder, made, shard_size=10**6)
    return folder


def arrays(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def test_memory_holds_little_beside_the_model(larger):
    load_pretrained(larger)  # modules and traces
    tracemalloc.start()
    try:
        model, _ = load_pretrained(larger)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = sum(array.nbytes for array in arrays(model))
    # A CPU's arrays are the memory that was written, which is traced; that of the head, which JAX transposes, is not.
    assert size - model.head.kernel.nbytes < held
    assert peak < 1.2 * size


def test_tensors_go_to_the_devices_of_a_mesh(larger):
    mesh = jax.make_mesh((1, 2, 2, 1, 2), MESH_AXES)
    model, _ = load_pretrained(larger, mesh=mesh, rules=ShardingRules(smallest=1000))
    whole, _ = load_pretrained(larger)
    assert [str(entry) for entry in model.embedding.table[...].sharding.spec] == ["tensor", "fsdp"]
    (block,) = model.stack.stacked
    up = block.channel.up.kernel[...]
    assert [str(entry) for entry in up.sharding.spec] == ["None", "fsdp", "tensor"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(8, 32, 128)}
    assert all(array.sharding.mesh == mesh for array in arrays(model))
    for ours, theirs in zip(arrays(model), arrays(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_files_are_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        for mask in (0o022, 0o027):
            os.umask(mask)
            for size in (100, 10):
                folder = tmp_path / f"{mask}-{size}"
                folder.mkdir()
                files.write_tensors(folder, [("a", np.ones(8)), ("b", np.ones(8))], shard_size=size)
                modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
                assert modes == {0o666 & ~mask}
    finally:
        os.umask(before)


def test_identifiers_of_a_hub(monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "some/llama":
            raise OSError("no network\nmore")
        return str(DATA / "llama")

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download)
    )
    assert loading.load_config("some/llama") == loading.load_config(DATA / "llama")
    assert asked[0][0] == "some/llama"
    assert "*.safetensors" in asked[0][1]
    with pytest.raises(ValueError, match="hub does not give it: no network; without a network, give"):
        load_pretrained("some/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"huggingface_hub: pip install 'jax-seqmodels\[hub\]'"):
        load_pretrained("some/llama")
    with pytest.raises(ValueError, match="'some/more/llama' is no folder; expected one with config.json"):
        load_pretrained("some/more/llama")
