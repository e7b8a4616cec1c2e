"""A low-rank adapter that peft made of a tiny checkpoint (`tools/interop_data.py`): its sum with the matrices, and refusals."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from experiments import convert
from seqmodels import (
    LoraConfig,
    adapt,
    load_adapter,
    load_pretrained,
    merge_adapters,
    save_adapter,
    save_pretrained,
)
from seqmodels.adapters import linear_maps
from seqmodels.names import by_layer

BASE, ADAPTER = (Path(__file__).parent / name for name in ("data/llama", "adapter"))
OF_EMBEDDINGS = Path(__file__).parent / "adapter_of_embeddings"
DOWN = "layers.1.mlp.down_proj"


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(ADAPTER, tmp_path / "adapter")


def test_factors_are_added_to_matrices(tmp_path):
    model, _ = load_pretrained(BASE, adapter=ADAPTER)
    save_pretrained(model, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, tmp_path / "merged"))
    factors = load_file(ADAPTER / "adapter_model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        product = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        alpha = 3 if "down_proj" in name else 6  # alpha_pattern
        np.testing.assert_allclose(after[name], before[name] + alpha / np.sqrt(2) * product, atol=1e-6)
    assert convert.main([str(BASE), str(tmp_path / "out"), f"--adapter={ADAPTER}"]) == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(again[name], after[name]) for name in after)


def test_logits_beside_and_merged(tmp_path):
    want = load_file(ADAPTER / "expected.safetensors")
    beside = load_adapter(load_pretrained(BASE)[0], ADAPTER)
    merged, _ = load_pretrained(BASE, adapter=ADAPTER)
    run = jax.jit(lambda model, ids: model(ids)[0])
    for model in (beside, merged):
        got = run(model, want["tokens"])
        assert np.linalg.norm(got - want["logits"]) <= 1e-4 * np.linalg.norm(want["logits"])
    merge_adapters(beside)
    again, whole = by_layer(beside), by_layer(merged)
    for name in whole:
        np.testing.assert_allclose(again[name], whole[name], atol=1e-6, err_msg=name)


def test_an_adapter_of_embeddings(tmp_path):
    """peft's is read beside and merged, and written again; its dropout is kept."""
    want = load_file(OF_EMBEDDINGS / "expected.safetensors")
    beside, merged = (
        load_adapter(load_pretrained(BASE)[0], OF_EMBEDDINGS),
        load_pretrained(BASE, adapter=OF_EMBEDDINGS)[0],
    )
    run = jax.jit(lambda model, ids: model(ids)[0])
    for model in (beside, merged):
        got = run(model, want["tokens"])
        assert np.linalg.norm(got - want["logits"]) <= 1e-4 * np.linalg.norm(want["logits"])
    save_adapter(beside, tmp_path / "out", base=str(BASE))
    got, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", OF_EMBEDDINGS)
    )
    table = theirs.pop("base_model.model.model.embed_tokens.base_layer.weight")
    assert got.keys() == theirs.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], theirs[name], err_msg=name)
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (made["lora_dropout"], made["fan_in_fan_out"]) == (0.1, False)
    assert "model.embed_tokens" in made["target_modules"]
    merge_adapters(beside)
    for name, value in by_layer(merged).items():
        np.testing.assert_allclose(by_layer(beside)[name], value, atol=1e-6, err_msg=name)
    other = {"base_model.model.model.embed_tokens.base_layer.weight": table + 1}
    shutil.copytree(OF_EMBEDDINGS, tmp_path / "other")
    save_file(theirs | other, tmp_path / "other" / "adapter_model.safetensors")
    for load in (
        lambda: load_pretrained(BASE, adapter=tmp_path / "other"),
        lambda: load_adapter(merged, tmp_path / "other"),
    ):
        with pytest.raises(ValueError, match="differs from model.embed_tokens.weight of the checkpoint"):
            load()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_an_adapter_of_stacked_experts(family, tmp_path):
    """Gates and inputs take turns in one family and follow each other in the other, whose checkpoint has experts by themselves."""
    base, folder = BASE.parent / family, BASE.parents[1] / f"adapter_of_{family}"
    want = load_file(folder / "expected.safetensors")
    model, _ = load_pretrained(base, adapter=folder)
    run = jax.jit(lambda model, ids: model(ids)[0])
    got, bare = run(model, want["tokens"]), run(load_pretrained(base)[0], want["tokens"])
    assert np.linalg.norm(got - want["logits"]) <= 1e-4 * np.linalg.norm(want["logits"])
    assert np.linalg.norm(bare - want["logits"]) > 0.1 * np.linalg.norm(want["logits"])
    with pytest.raises(
        ValueError, match="whose experts take no adapter beside them; expected .*load_pretrained"
    ):
        load_adapter(model, folder)
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "adapter_config.json"
    options = json.loads(file.read_text())

    def changed(text, targets=options["target_parameters"]):
        file.write_text(json.dumps(options | {"target_parameters": targets}))
        with pytest.raises(ValueError, match=text):
            load_pretrained(base, adapter=tmp_path / "other")

    changed(
        "has 2 adapters of model.layers.0.mlp.experts, of whose .* has down_proj; expected", ["down_proj"]
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    save_file(tensors | {name: tensors[name][:, 1:]}, tmp_path / "other" / "adapter_model.safetensors")
    changed(
        r"has factors of the shapes \(8, 11\) and \(16, 8\) for model.layers.1.mlp.experts.down_proj of 4 exp"
    )
    moved = {key.replace("layers.1.mlp", "layers.7.mlp"): value for key, value in tensors.items()}
    save_file(moved, tmp_path / "other" / "adapter_model.safetensors")
    changed("adapts model.layers.7.mlp.experts, and the model has no experts there")


def test_an_adapter_of_embeddings_that_the_head_reads_too(tmp_path):
    """It stays beside the table, which the head reads as it is."""
    tied = BASE.parent / "gemma"
    model, _ = load_pretrained(tied)
    adapt(model, LoraConfig(rank=2, targets="embedding"), rngs=nnx.Rngs(0))
    model.embedding.adapter.b.set_value(jax.numpy.ones_like(model.embedding.adapter.b[...]))
    bare = model.embedding.table[...]
    ids = jax.numpy.arange(6)[None]
    changed, _ = model.unprojected(ids)
    np.testing.assert_array_equal(changed.matrix, bare)
    save_adapter(model, tmp_path / "out", base=str(tied))
    again, _ = load_adapter(load_pretrained(tied)[0], tmp_path / "out").unprojected(ids)
    np.testing.assert_array_equal(again.x, changed.x)
    with pytest.raises(ValueError, match="its head reads the same table"):
        merge_adapters(model)
    with pytest.raises(ValueError, match="whose matrix is the head's too"):
        load_pretrained(tied, adapter=tmp_path / "out")


def test_what_peft_wrote_is_written_again(tmp_path):
    model = load_adapter(load_pretrained(BASE)[0], ADAPTER)
    with pytest.raises(
        ValueError, match="the model has adapters; expected one after seqmodels.merge_adapters"
    ):
        save_pretrained(model, tmp_path / "whole")
    save_adapter(model, tmp_path / "out", base=str(BASE))
    got, want = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", ADAPTER))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    made, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "out", ADAPTER)
    )
    for name in (
        "peft_type",
        "bias",
        "r",
        "lora_alpha",
        "use_rslora",
        "fan_in_fan_out",
        "rank_pattern",
    ):
        assert made[name] == theirs[name], name
    assert made["alpha_pattern"] == {f"model.layers.{layer}.mlp.down_proj": 3 for layer in (0, 1)}
    assert {name.split(".")[-1] for name in made["target_modules"]} == {"q_proj", "down_proj"}
    with pytest.raises(ValueError, match="holds adapter_config.json already"):
        save_adapter(model, tmp_path / "out")
    merge_adapters(model)
    with pytest.raises(ValueError, match="the model has no adapters"):
        save_adapter(model, tmp_path / "none")


# One matrix of theirs for each of ours, several of ours in one of theirs (transposed in gpt2), several of theirs in one of ours.
FAMILIES = ("llama", "gpt_neox", "gpt2", "phi3", "kimi_linear", "qwen3_next")


@pytest.mark.parametrize("stabilized", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt_neox")) for name in FAMILIES]
)
def test_adapters_of_families(family, stabilized, tmp_path):
    base = BASE.parent / family
    model, _ = load_pretrained(base)
    config = LoraConfig(rank=2, alpha=3.0, rslora=stabilized, targets=("all-linear",))
    assert adapt(model, config, rngs=nnx.Rngs(0))
    for number, module in enumerate(linear_maps(model).values()):
        if module.adapter is not None:
            drawn = 0.1 * jax.random.normal(jax.random.key(number), module.adapter.b.shape)
            module.adapter.b.set_value(drawn)
    save_adapter(model, tmp_path / "one", base=str(base))
    (architecture,) = json.loads((base / "config.json").read_text())["architectures"]
    again = load_adapter(load_pretrained(base)[0], tmp_path / "one", architecture=architecture)
    save_adapter(again, tmp_path / "two", base=str(base))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    merged = by_layer(load_pretrained(base, adapter=tmp_path / "one")[0])
    merge_adapters(model)
    for name, array in by_layer(model).items():
        np.testing.assert_allclose(merged[name], array, atol=1e-6, err_msg=name)


def test_an_adapter_of_another_checkpoint(tmp_path):
    with pytest.raises(
        ValueError, match=r"has factors of the shapes \(2, 16\) and \(16, 2\) for .* of shape \("
    ):
        load_adapter(load_pretrained(BASE.parent / "mistral")[0], ADAPTER)
    with pytest.raises(
        ValueError, match=r"adapts model.layers.0.mlp.down_proj.weight.* which the checkpoint does not have"
    ):
        load_adapter(load_pretrained(BASE.parent / "gpt2")[0], ADAPTER)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"new_kind": 3}, "options that are not supported: new_kind=3"),
        ({"lora_alpha": "left out"}, "lacks the option 'lora_alpha'"),
    ],
)
def test_options_that_are_refused(adapter, options, message):
    made = json.loads((adapter / "adapter_config.json").read_text()) | options
    kept = {name: value for name, value in made.items() if value != "left out"}
    (adapter / "adapter_config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError) as caught:
        load_pretrained(BASE, adapter=adapter)
    assert message in str(caught.value)


def test_factors_that_are_refused(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    first = f"base_model.model.model.{DOWN}.lora_A.weight"

    def refused(changed, message):
        save_file(changed, file)
        with pytest.raises(ValueError) as caught:
            load_pretrained(BASE, adapter=adapter)
        assert message in str(caught.value)

    refused({name: value for name, value in factors.items() if name != first}, f"lacks the tensor {first}")
    refused(factors | {first: factors[first][:, 1:].copy()}, f"for model.{DOWN}.weight of shape (16, 24)")
    other = {name.replace("down_proj", "dwn_proj"): value for name, value in factors.items()}
    refused(other, "did you mean 'model.layers.")
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 40), np.float32)}
    refused(factors | embedding, "lacks the tensor base_model.model.model.embed_tokens.lora_embedding_B")
    other = {f"base_model.model.model.{DOWN}.lora_C": np.zeros(2, np.float32)}
    refused(factors | other, f"{DOWN}.lora_C, which is not supported")
    with pytest.raises(ValueError, match=r"expected one with adapter_config\.json and safetensors"):
        load_pretrained(BASE, adapter=tmp_path / "none")
    assert convert.main([str(tmp_path), str(tmp_path / "out"), f"--adapter={adapter}"]) == 2
