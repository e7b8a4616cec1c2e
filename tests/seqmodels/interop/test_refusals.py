"""Checkpoints that are refused, each with what is wrong with it; and models that no published architecture expresses."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import seqmodels
from seqmodels import load_pretrained, save_pretrained
from seqmodels.interop.families import FAMILIES
from seqmodels.interop.loading import shapes_of
from seqmodels.interop.saving import differences

DATA = Path(__file__).parent / "data"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "llama"
    shutil.copytree(DATA / "llama", made)
    (made / "expected.safetensors").unlink()
    return made


def set_options(folder, **options):
    config = json.loads((folder / "config.json").read_text()) | options
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, *words):
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"architectures": ["LlamaForCausaLM"]},
            ["'LlamaForCausaLM'; did you mean 'LlamaForCausalLM'", "Qwen3ForCausalLM"],
        ),
        ({"architectures": None, "model_type": "lama"}, ["'lama'; did you mean 'llama'"]),
        ({"rope_parameters": {"rope_type": "other", "factor": 2.0}}, ["rope_type='other'", "llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor=None", "which rope_type='linear' needs"]),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 2.0]}}, ["rope_parameters.long_factor=None"]),
        ({"rope_parameters": {"rope_theta": 1e4, "mscale": 2.0}}, ["rope_parameters.mscale=2.0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "this architecture turns all features"]),
        ({"hidden_act": "tanh"}, ["hidden_act='tanh'", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["options that are not supported: quantization_config={'bits': 4}"]),
        ({"sliding_windw": 4}, ["sliding_windw=4"]),
        ({"hidden_size": "left out"}, ["lacks the option 'hidden_size'"]),
        ({"layer_types": ["full_attention"]}, ["layer_types=['full_attention']", "num_hidden_layers=2"]),
        ({"layer_types": ["chunked_attention"] * 2}, ["layer_types='chunked_attention'"]),
        ({"num_hidden_layers": 3}, ["lacks the tensors model.layers.2."]),
        ({"num_hidden_layers": 1}, ["has the tensors model.layers.1.", "and 6 more, which its config.json does not ask for"]),
        ({"tie_word_embeddings": True}, ["has the tensor lm_head.weight"]),
        ({"attention_bias": True}, ["lacks the tensors model.layers.0.self_attn.k_proj.bias"]),
        ({"intermediate_size": 25}, ["model.layers.0.mlp.gate_proj.weight of shape (24, 16)", "asks for (25, 16)"]),
        ({"vocab_size": 41}, ["model.embed_tokens.weight of shape (40, 16)", "asks for (41, 16)"]),
    ],
)  # fmt: skip
def test_configs(folder, options, words):
    set_options(folder, **options)
    refused(folder, *words)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("longt5", {"d_kv": 6}, ["d_kv=6", "expected d_model / num_heads = 8"]),
        ("longt5", {"encoder_attention_type": "full"}, ["encoder_attention_type='full'", "'local' or 'transient-global'"]),
        ("longt5", {"feed_forward_proj": "gated-silu"}, ["feed_forward_proj='gated-silu'", "'relu' or 'gated-gelu'"]),
        ("longt5", {"num_layers": 3}, ["lacks the tensors encoder.block.2."]),
        ("rwkv4", {"attention_hidden_size": 32}, ["attention_hidden_size=32", "expected hidden_size=16"]),
        ("rwkv6", {"expand_k": 0.5}, ["expand_k=0.5", "expected 1.0"]),
        ("rwkv6", {"num_heads": 3}, ["num_heads=3", "a divisor of hidden_size=16"]),
        ("rwkv7", {"norm_first": False}, ["norm_first=False", "expected True"]),
        ("rwkv7", {"value_dim": [16, 16, 32]}, ["value_dim=[16, 16, 32]"]),
        ("rwkv7", {"num_heads": 4}, ["num_heads=4", "hidden_size / head_dim = 2"]),
        ("lfm2", {"layer_types": ["conv"]}, ["layer_types=['conv']", "num_hidden_layers=2"]),
        ("lfm2", {"block_use_swiglu": False}, ["block_use_swiglu=False"]),
        ("lfm2", {"block_auto_adjust_ff_dim": 1}, ["block_auto_adjust_ff_dim=1", "true or false"]),
        ("lfm2", {"block_auto_adjust_ff_dim": True}, ["w1.weight of shape (24, 16)", "asks for (256, 16)"]),
        ("minimax", {"mlp_alpha_factor": 2}, ["mlp_alpha_factor=2", "full_attn_alpha_factor=1.7"]),
        ("minimax", {"layer_types": ["full_attention"]}, ["layer_types=['full_attention']", "num_hidden_layers=3"]),
        ("nemotron_h", {"layers_block_type": ["mlp"] * 5}, ["layers_block_type='mlp'", "or mlp or moe after one of them"]),
        ("nemotron_h", {"layers_block_type": ["mamba", "rnn"], "num_hidden_layers": 2}, ["layers_block_type='rnn'"]),
        ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M-M*", "num_hidden_layers": 5},
         ["the kinds of num_hidden_layers=5 layers"]),
        ("nemotron_h", {"attention_head_dim": 4}, ["attention_head_dim=4", "head_dim=8"]),
        ("nemotron_h", {"head_dim": "left out", "attention_head_dim": 6}, ["q_proj.weight of shape (32, 16)", "asks for (24, 16)"]),
        ("nemotron_h", {"rms_norm_eps": 1e-6}, ["rms_norm_eps=1e-06", "expected 1e-05"]),
        ("falcon_h1", {"attn_layer_indices": [0]}, ["attn_layer_indices=[0]"]),
        ("xlstm", {"head_dim": 4}, ["head_dim=4", "expected 8"]),
        ("nemotron_h_moe", {"moe_latent_size": 4}, ["lacks the tensors backbone.layers.1.mixer.fc1_latent_proj.weight"]),
        ("nemotron_h_latent", {"moe_latent_size": None}, ["fc1_latent_proj.weight", "its config.json does not ask for"]),
        ("nemotron_h_moe", {"moe_shared_expert_intermediate_size": 12}, ["moe_shared_expert_intermediate_size=12", "a multiple of 8"]),
        ("nemotron_h_moe", {"mlp_bias": True}, ["mlp_bias=True", "False with experts"]),
        ("nemotron_h", {"num_nextn_predict_layers": 1}, ["num_nextn_predict_layers=1"]),
        ("xlstm", {"weight_mode": "joint"}, ["weight_mode='joint'", "'single' or 'fused'"]),
        ("xlstm_fused", {"qk_dim_factor": 0.25}, ["mlstm_layer.qkv_opreact.weight of shape (48, 16)", "asks for (40, 16)"]),
        ("hgrn2", {"use_short_conv": True}, ["use_short_conv=True", "expected False"]),
        ("hgrn2", {"expand_ratio": 5}, ["expand_ratio=5", "a divisor of hidden_size=16"]),
        ("hgrn2", {"use_lower_bound": False}, ["has the tensor model.lower_bounds"]),
        ("forgetting_transformer", {"window_size": 8}, ["window_size=8", "expected None"]),
        ("forgetting_transformer", {"qkv_bias": True}, ["qkv_bias=True", "expected False"]),
        ("forgetting_transformer", {"num_heads": 3}, ["num_heads=3", "a divisor of hidden_size=16"]),
        ("xlstm", {"qk_dim_factor": 0.45}, ["qk_dim_factor=0.45", "num_heads=2 divides"]),
        ("xlstm", {"ffn_round_up_to_multiple_of": 64}, ["ffn.proj_up_gate.weight of shape (24, 16)", "asks for (64, 16)"]),
        ("retnet", {"use_output_gate": False}, ["use_output_gate=False", "expected True"]),
        ("comba", {"use_inner_decay": False}, ["use_inner_decay=False", "expected True"]),
        ("gated_deltaproduct", {"num_householder": 3}, ["k_proj.weight of shape (16, 16)", "asks for (24, 16)"]),
        ("zamba2", {"layers_block_type": ["hybrid"]}, ["layers_block_type=['hybrid']", "num_hidden_layers=4"]),
        ("zamba2", {"layers_block_type": ["mamba"] * 4}, ["a hybrid layer"]),
        ("zamba2", {"num_mem_blocks": 4}, ["num_mem_blocks=4", "1 to 3"]),
        ("zamba2", {"n_mamba_heads": 5}, ["n_mamba_heads=5", "hidden_size = 32"]),
        ("zamba2", {"num_attention_heads": 5}, ["num_attention_heads=5", "hidden_size = 32"]),
        ("zamba2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'"]),
        ("zamba2", {"use_mem_rope": 1}, ["use_mem_rope=1", "true or false"]),
        ("zamba2", {"use_shared_attention_adapter": False}, ["linear_k_adapter_list.0.0.weight"]),
        ("zamba2", {"time_step_limit": [0.0, 1.0]}, ["time_step_limit=[0.0, 1.0]"]),
        ("falcon_h1", {"mamba_n_heads": 4}, ["mamba_n_heads=4", "mamba_d_ssm / mamba_d_head = 3"]),
        ("falcon_h1", {"projectors_bias": True}, ["projectors_bias=True", "mamba_proj_bias=False"]),
        ("falcon_h1", {"mamba_rms_norm": True}, ["lacks the tensors model.layers.0.mamba.norm.weight"]),
    ],
)  # fmt: skip
def test_configs_of_families(name, options, words, tmp_path):
    made = shutil.copytree(DATA / name, tmp_path / name)
    set_options(made, **options)
    refused(made, *words)


def test_tensors_and_files(folder):
    change_tensors(folder, lambda tensors: tensors.update(other=tensors.pop(QUERY)))
    refused(folder, f"lacks the tensor {QUERY}")
    change_tensors(folder, lambda tensors: tensors.update({QUERY: tensors["other"]}))
    refused(folder, "has the tensor other")
    change_tensors(folder, lambda tensors: tensors.update({QUERY: tensors.pop("other")[:8]}))
    refused(folder, f"{QUERY} of shape (8, 16)", "asks for (16, 16)")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    refused(folder, "model.safetensors is truncated")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "has no model.safetensors", "pytorch_model.bin may hold code")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is no JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json holds a list")
    (folder / "config.json").unlink()
    refused(folder, "config.json cannot be read")
    refused(folder / "none", "none' is no folder")


# Families whose pairs and options are of different kinds; what is refused of others is in the slow tests.
OFTEN = ("gpt_oss", "kimi_linear")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each.name, marks=[pytest.mark.slow] * (each.name not in OFTEN))
        for each in sorted(DATA.iterdir())
    ],
)
def test_each_family_refuses_what_does_not_fit(name, tmp_path):
    made = shutil.copytree(DATA / name, tmp_path / name)
    (made / "expected.safetensors").unlink()
    tensors = load_file(made / "model.safetensors")
    config = json.loads((made / "config.json").read_text())
    set_options(made, unheard_of=3)
    refused(made, "options that are not supported: unheard_of=3")
    (made / "config.json").write_text(json.dumps(config))
    one = next(each for each in sorted(tensors) if "norm" in each.lower() or "ln" in each)
    save_file({each: value for each, value in tensors.items() if each != one}, made / "model.safetensors")
    refused(made, f"lacks the tensor {one}")
    save_file(tensors | {"unheard_of": tensors[one]}, made / "model.safetensors")
    refused(made, "has the tensor unheard_of")
    save_file(tensors | {one: tensors[one][:-1]}, made / "model.safetensors")
    refused(made, one, f"of shape {tensors[one][:-1].shape}", f"asks for {tensors[one].shape}")
    weights = (DATA / name / "model.safetensors").read_bytes()
    (made / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(made, "model.safetensors is truncated")


def test_shards(folder, tmp_path):
    model, _ = load_pretrained(folder)
    save_pretrained(model, tmp_path / "cut", shard_size=8_000)
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(shards) > 2
    again, _ = load_pretrained(tmp_path / "cut")
    np.testing.assert_array_equal(again.embedding.table[...], model.embedding.table[...])
    index = tmp_path / "cut" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shards[1].rename(tmp_path / "moved")
    refused(tmp_path / "cut", f"lacks {shards[1].name}")
    index.write_text(
        json.dumps({"weight_map": {"a": "../llama/model.safetensors"}} | {"metadata": listed["metadata"]})
    )
    refused(tmp_path / "cut", "expected files of the same folder")
    index.write_text("{}")
    refused(tmp_path / "cut", "has no weight_map")


def test_a_tokenizer_of_more_ids_than_embeddings(folder):
    made = {"model": {"vocab": {"a": 0, "b": 39}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    load_pretrained(folder)
    made["added_tokens"] = [{"id": 40, "content": "c"}]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    refused(folder, "ids up to 40, but vocab_size=40")


def test_names_without_the_first_part(folder):
    def bare(tensors):
        renamed = {name.removeprefix("model."): tensors[name] for name in tensors}
        tensors.clear()
        tensors.update(renamed)

    want, _ = load_pretrained(folder)
    change_tensors(folder, bare)
    got, _ = load_pretrained(folder)
    np.testing.assert_array_equal(got.norm.scale[...], want.norm.scale[...])
    np.testing.assert_array_equal(got.head.kernel[...], want.head.kernel[...])


def test_another_name_of_a_norm(tmp_path):
    """The norm of GLA is called otherwise where it is computed together with the gate."""

    def fused(tensors):
        for name in list(tensors):
            tensors[name.replace("g_norm", "g_norm_swish_gate")] = tensors.pop(name)

    made = shutil.copytree(DATA / "gla", tmp_path / "gla")
    want, _ = load_pretrained(made)
    change_tensors(made, fused)
    got, _ = load_pretrained(made)
    ours, theirs = (model.stack.stacked[0].mixer.norm.scale[...] for model in (got, want))
    np.testing.assert_array_equal(ours, theirs)
    save_pretrained(got, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["fuse_norm"] is False


def build(**options):
    sizes = {"vocab_size": 11, "width": 16, "depth": 2, "pattern": ("attention",)}
    return seqmodels.build_model({"kind": "language_model", **sizes, **options}, rngs=nnx.Rngs(0))


def test_mixers_side_by_side(tmp_path):
    """What is left out of a config is as its default; a part that another kind of layer has is named."""
    branches = {"mamba2": {"head_dim": 8, "norm": "none", "epsilon": 1e-6}, "attention": {"heads": 2}}
    model = build(pattern=("parallel",), mixers={"parallel": {"branches": branches}}, tie_embeddings=False)
    save_pretrained(model, tmp_path / "out")
    again, _ = load_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "falcon_h1"
    np.testing.assert_array_equal(model.head.kernel[...], again.head.kernel[...])
    scaled = {"parallel": {"branches": branches, "scales": {"mamba2": 2.0}}}
    other = build(pattern=("parallel",), mixers=scaled, tie_embeddings=False)
    assert differences(model, other)[0] == "layer 0: mixer.scales.mamba2=2.0 and the model 1.0"
    branches["attention"]["qk_norm"] = True
    model = build(pattern=("parallel",), mixers={"parallel": {"branches": branches}}, tie_embeddings=False)
    with pytest.raises(ValueError, match="qk_norm=False and the model True"):
        save_pretrained(model, tmp_path / "other")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pattern": ("s5",)}, "layers of s5"),
        (
            {"mixers": {"attention": {"heads": 2, "sink_logits": True}}},
            "sink_logits=False and the model True",
        ),
        ({"residual_scale": 2.0}, "residual_scale=1.0 and the model 2.0"),
        ({"channels": {"swiglu": {"activation": "sigmoid"}}}, "nearest, "),
    ],
)
def test_models_without_an_architecture(options, words, tmp_path):
    with pytest.raises(ValueError, match="no supported architecture of transformers") as caught:
        save_pretrained(build(**options), tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_shared_block_without_an_architecture(tmp_path):
    config = load_pretrained(DATA / "zamba2")[1]
    mixer = config["shared"]["mixer"] | {"logit_cap": 3.0}
    model = shapes_of(config | {"shared": config["shared"] | {"mixer": mixer}})
    with pytest.raises(ValueError, match=r"Zamba2ForCausalLM, has shared 0: mixer\.logit_cap=None"):
        save_pretrained(model, tmp_path / "out")


def test_folders_and_arguments_of_saving(folder, tmp_path, monkeypatch):
    model, _ = load_pretrained(folder)
    with pytest.raises(ValueError, match=r"holds config\.json already"):
        save_pretrained(model, folder)
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(model, folder / "config.json")
    with pytest.raises(ValueError, match="did you mean 'MistralForCausalLM'"):
        save_pretrained(model, tmp_path / "out", architecture="MistralForCausaLM")
    with pytest.raises(
        ValueError, match="cannot express the model, whose layers are attention; expected an arch"
    ):
        save_pretrained(model, tmp_path / "out", architecture="NemotronHForCausalLM")
    with pytest.raises(ValueError, match="model is a NoneType"):
        save_pretrained(None, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"jax-seqmodels\[pretrained\]"):
        load_pretrained(folder)


def test_a_constant_of_a_family_is_checked(tmp_path):
    model, _ = load_pretrained(DATA / "falcon_mamba")
    scale = model.stack.stacked[0].mixer.inner_norms[1].scale
    scale[...] = 2 * scale[...]
    with pytest.raises(ValueError, match="is not 1, the only value"):
        save_pretrained(model, tmp_path / "out", architecture="FalconMambaForCausalLM")


def test_a_model_of_ours_in_bfloat16(tmp_path):
    options = {"mixers": {"attention": {"heads": 4, "kv_heads": 2}}, "tie_embeddings": False}
    model = build(**options, param_dtype="bfloat16")
    save_pretrained(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    again, _ = load_pretrained(tmp_path / "out", param_dtype="bfloat16")
    for name in ("key", "output"):
        ours, theirs = (getattr(m.stack.stacked[0].mixer, name).kernel for m in (model, again))
        assert theirs.dtype == "bfloat16"
        np.testing.assert_array_equal(ours[...], theirs[...])


def test_every_family_names_a_folder_of_its_own():
    assert len({family.model_type for family in FAMILIES.values()}) == len(FAMILIES)
