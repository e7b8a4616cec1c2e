"""Tiny checkpoints that transformers made (`tools/interop_data.py`): logits, greedy continuations and round trips.

Logits to a relative 1e-4 in float32: of a full pass, of one with padding on the left or right, and of a chunk and steps that carry a
state. Continuations of 32 tokens and tensors of a round trip are equal. Masked language models have full passes and round trips.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import seqmodels
from seqmodels.interop.families import FAMILIES
from seqmodels.names import by_layer

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(folder.name for folder in DATA.iterdir())
# What is not left to the slow tests: outputs of two models, steps of a hybrid, continuations of one model, and tensors of those
# whose pairs are of each kind.
FULL, STEPS, CONTINUED = ("llama", "qwen3_next"), ("recurrent_gemma",), ("llama",)
KEPT = ("llama", "gpt2", "qwen3_next", "gpt_oss", "kimi_linear", "granite_moe_hybrid", "falcon")
KEPT += ("rwkv7", "nemotron_h", "zamba2", "fnet")
TOLERANCE = 1e-4


def slow_but(names, among=FOLDERS):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in names)) for name in among]


def expected(name):
    return load_file(DATA / name / "expected.safetensors")


# Those of single sequences, and among them those that go on with a text; `test_encoder_decoders` has the others.
SINGLE = [name for name in FOLDERS if "source" not in expected(name)]
CAUSAL = [name for name in SINGLE if "greedy" in expected(name)]


def read(folder):
    return json.loads((folder / "config.json").read_text())


def close(got, want):
    error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
    assert error <= TOLERANCE, f"relative error {error:.1e}"


def joined(tensors):
    """Joins tensors of xLSTM that are one with fused weights: it is written with single ones."""
    parts = {
        "mlstm_layer.qkv_opreact.weight": [
            f"mlstm_layer.{name}.weight" for name in ("q", "k", "v", "ogate_preact")
        ],
        "mlstm_layer.ifgate_preact.weight": [f"mlstm_layer.{name}gate_preact.weight" for name in "if"],
        "mlstm_layer.ifgate_preact.bias": [f"mlstm_layer.{name}gate_preact.bias" for name in "if"],
        "ffn.proj_up_gate_z.weight": ["ffn.proj_up_gate.weight", "ffn.proj_up.weight"],
    }
    for block in ("backbone.blocks.0.", "backbone.blocks.1."):
        for whole, names in parts.items():
            tensors[block + whole] = np.concatenate([tensors.pop(block + name) for name in names])


def test_every_family_has_a_checkpoint():
    named = {read(DATA / name)["architectures"][0] for name in FOLDERS}
    assert named == set(FAMILIES)


@pytest.mark.parametrize("name", slow_but(KEPT))
def test_round_trip(name, tmp_path):
    model, config = seqmodels.load_pretrained(DATA / name)
    (architecture,) = read(DATA / name)["architectures"]
    seqmodels.save_pretrained(model, tmp_path / "out", architecture=architecture)
    assert read(tmp_path / "out")["architectures"] == [architecture]
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (DATA / name, tmp_path / "out"))
    unread = re.compile(FAMILIES[architecture].unread)
    theirs = {tensor: value for tensor, value in theirs.items() if not unread.search(tensor)}
    if name == "xlstm_fused":
        joined(ours)
    assert theirs.keys() == ours.keys()
    if name == "hgrn2":
        # Bounds are other numbers with us: the same to rounding.
        bounds = (tensors.pop("model.lower_bounds") for tensors in (theirs, ours))
        np.testing.assert_allclose(*bounds, atol=2e-6)
    for tensor, value in theirs.items():
        assert ours[tensor].dtype == value.dtype
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)
    again, config_again = seqmodels.load_pretrained(tmp_path / "out")
    own, other = by_layer(model), by_layer(again)
    assert own.keys() == other.keys()
    for variable, value in own.items():
        rounded = 2e-6 if variable.endswith("bound_logit") else 0
        np.testing.assert_allclose(other[variable], value, rtol=0, atol=rounded, err_msg=variable)
    assert config_again == config


@pytest.mark.parametrize("name", slow_but(FULL, SINGLE))
def test_full_pass_and_padding(name):
    model, config = seqmodels.load_pretrained(DATA / name)
    want = expected(name)
    ids, width = want["tokens"], want["tokens"].shape[1]
    assert config["vocab_size"] == want["logits"].shape[2]
    # Padding on the left of the first row and on the right of the second, of a token that would be seen.
    padded, real = np.full((2, width + 3), 7), np.zeros((2, width + 3), np.int32)
    padded[0, 3:], padded[1, :width] = ids
    real[0, 3:], real[1, :width] = 1, 1

    types = want.get("types")

    @jax.jit
    def run(ids, padded, real, types):
        typed = None if types is None else model(ids, types=types)[0]
        return model(ids)[0], model(padded, segment_ids=real)[0], typed

    full, beside, typed = run(ids, padded, real, types)
    close(full, want["logits"])
    if types is not None:
        close(typed, want["typed_logits"])
    close(jnp.stack([beside[0, 3:], beside[1, :width]]), want["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FOLDERS if "longer" in expected(name)])
def test_positions_that_depend_on_the_number_of_tokens(name):
    want = expected(name)
    model, _ = seqmodels.load_pretrained(DATA / name, max_length=want["longer"].shape[1])
    close(jax.jit(lambda ids: model(ids)[0])(want["longer"]), want["longer_logits"])


@pytest.mark.parametrize("name", slow_but(STEPS, CAUSAL))
def test_a_chunk_and_steps(name):
    model, _ = seqmodels.load_pretrained(DATA / name)
    want = expected(name)
    ids = jnp.asarray(want["tokens"])

    @jax.jit
    def run(ids):
        head, state = model(ids[:, :9], model.init_state(2, max_length=24))

        def step(state, token):
            logits, state = model(token[:, None], state)
            return state, logits[:, 0]

        return head, jax.lax.scan(step, state, ids[:, 9:].T)[1]

    head, steps = run(ids)
    close(jnp.concatenate([head, jnp.moveaxis(steps, 0, 1)], axis=1), want["logits"])


@pytest.mark.parametrize("name", slow_but(CONTINUED, CAUSAL))
def test_greedy_continuations(name):
    model, _ = seqmodels.load_pretrained(DATA / name)
    want = expected(name)
    made = seqmodels.generate(
        model, want["tokens"][:, :8], max_new_tokens=32, temperature=0, chunk=8, block=16
    )
    np.testing.assert_array_equal(made.tokens, want["greedy"])


def test_the_checkpoints_are_of_one_version():
    versions = set()
    for name in FOLDERS:
        with safe_open(DATA / name / "expected.safetensors", framework="np") as file:
            versions.add(file.metadata()["transformers"])
    assert len(versions) == 1
