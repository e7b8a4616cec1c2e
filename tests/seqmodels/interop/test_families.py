"""Tiny checkpoints that transformers made (`tools/interop_data.py`): logits, greedy continuations and round trips.

Logits to a relative 1e-4 in float32: of a full pass, and of a chunk, eight steps and a chunk that carry a state. Continuations of 16
tokens and tensors of a round trip are equal.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import seqmodels
from seqmodels.interop.families import FAMILIES

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(folder.name for folder in DATA.iterdir())
# Whose continuations and steps are not left to the slow tests: one per kind of state.
DEFAULT = ("gpt_neox", "llama", "mamba2", "recurrent_gemma")
TOLERANCE = 1e-4
by_state = [pytest.param(name, marks=[pytest.mark.slow] * (name not in DEFAULT)) for name in FOLDERS]


def expected(name):
    return load_file(DATA / name / "expected.safetensors")


def close(got, want):
    error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
    assert error <= TOLERANCE, f"relative error {error:.1e}"


def test_every_family_has_a_checkpoint():
    named = {json.loads((DATA / name / "config.json").read_text())["architectures"][0] for name in FOLDERS}
    assert named == set(FAMILIES)


@pytest.mark.parametrize("name", FOLDERS)
def test_full_pass_and_round_trip(name, tmp_path):
    model, config = seqmodels.load_pretrained(DATA / name)
    want = expected(name)
    close(jax.jit(lambda ids: model(ids)[0])(jnp.asarray(want["tokens"])), want["logits"])
    assert config["vocab_size"] == want["logits"].shape[2]
    seqmodels.save_pretrained(model, tmp_path / "out")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (DATA / name, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    for tensor, value in theirs.items():
        assert ours[tensor].dtype == value.dtype
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)
    again, config_again = seqmodels.load_pretrained(tmp_path / "out")
    same = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), *map(arrays, (model, again)))
    assert all(jax.tree.leaves(same))
    assert config_again.keys() == config.keys()


def arrays(model):
    return seqmodels.names.by_layer(model)


@pytest.mark.parametrize("name", by_state)
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


@pytest.mark.parametrize("name", by_state)
def test_greedy_continuations(name):
    model, _ = seqmodels.load_pretrained(DATA / name)
    want = expected(name)
    made = seqmodels.generate(
        model, want["tokens"][:, :8], max_new_tokens=16, temperature=0, chunk=8, block=16
    )
    np.testing.assert_array_equal(made.tokens, want["greedy"])


def test_the_checkpoints_are_of_one_version():
    versions = set()
    for name in FOLDERS:
        with safe_open(DATA / name / "expected.safetensors", framework="np") as file:
            versions.add(file.metadata()["transformers"])
    assert len(versions) == 1
