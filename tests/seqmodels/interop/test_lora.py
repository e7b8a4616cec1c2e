"""A low-rank adapter that peft made of a tiny checkpoint (`tools/interop_data.py`): its sum with the matrices, and refusals."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import convert
from seqmodels import load_pretrained, save_pretrained

BASE, ADAPTER = (Path(__file__).parent / name for name in ("data/llama", "adapter"))
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


@pytest.mark.slow
def test_logits():
    model, _ = load_pretrained(BASE, adapter=ADAPTER)
    want = load_file(ADAPTER / "expected.safetensors")
    got = jax.jit(lambda ids: model(ids)[0])(want["tokens"])
    assert np.linalg.norm(got - want["logits"]) <= 1e-4 * np.linalg.norm(want["logits"])


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
    refused(factors | embedding, "embed_tokens.lora_embedding_A, which is not supported")
    with pytest.raises(ValueError, match=r"expected one with adapter_config\.json and safetensors"):
        load_pretrained(BASE, adapter=tmp_path / "none")
    assert convert.main([str(tmp_path), str(tmp_path / "out"), f"--adapter={adapter}"]) == 2
