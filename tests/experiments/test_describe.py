"""What a config's model is made of and costs, without making it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import describe
from experiments.analysis.flops import count_flops
from experiments.training import experiment
from layers.mixers import make_mixer
from seqmodels import build_model
from tests.layers.mixers.table import MIXERS

ROOT = Path(__file__).parents[2]
SIZES = dict(vocab_size=16, num_classes=10)


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    def refuse(name, **_):
        raise AssertionError(f"the data of {name} are not needed")

    monkeypatch.setattr(experiment, "make_task", refuse)


def config(**model):
    base = dict(kind="classifier", width=8, depth=2, pattern=("attention",), channel="mlp")
    return dict(seed=0, task=dict(name="listops"), model=base | model)


def test_parameters_are_those_of_the_model():
    given = config(
        depth=3,
        pattern=("s5", "local+half_glu1"),
        mixers={"local": dict(mixer="attention", heads=2, window=3)},
    )
    record = describe.describe(given, [16])
    model = build_model(given["model"] | SIZES, rngs=nnx.Rngs(0))
    sizes = [sum(p.size for p in jax.tree.leaves(nnx.state(b, nnx.Param))) for b in model.stack.blocks]
    assert [row["parameters"] for row in record["layers"]] == sizes
    assert record["parameters"] == sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert record["embedding_and_head"]["parameters"] == record["parameters"] - sum(sizes)
    names = [(row["mixer"], row["channel"]) for row in record["layers"]]
    assert names == [("s5", "mlp"), ("local (attention)", "half_glu1"), ("s5", "mlp")]


@pytest.mark.parametrize("scan", [True, False])
def test_products_of_a_transformer_are_those_by_hand(scan):
    width, time, depth = 16, 64, 3
    mixers = {"attention": dict(heads=2, causal=False)}
    record = describe.describe(config(width=width, depth=depth, mixers=mixers, scan=scan), [time])
    layer = 2 * (4 * width**2 + 8 * width**2) + 4 * time * width
    (row,) = record["lengths"]
    got = row["flops_per_token"] * row["in_matrix_products"]
    # Beside the layers: pooling by a product, and the head once a row.
    assert got == pytest.approx(depth * layer + 2 * width + 2 * width * 10 / time, rel=0.01)
    assert row["flops"] == pytest.approx(time * row["flops_per_token"])
    assert row["state_bytes"] is None
    for one in record["layers"]:
        assert layer < one["flops_per_token"] < 1.5 * layer


def test_a_model_too_large_for_this_machine_is_described():
    record = describe.describe(
        config(width=32768, depth=16, mixers={"attention": dict(heads=128)}, channel="swiglu"), [1024]
    )
    assert record["parameters"] > 2e11
    assert record["lengths"][0]["state_bytes"] > 16 * 2 * 4 * 1024 * 32768


def test_states_are_those_of_a_row():
    record = describe.describe(config(pattern=("s5",), mixers={"s5": dict(state_size=6)}), [16, 64])
    assert [row["state_bytes"] for row in record["lengths"]] == [2 * (3 * 8 + 3 * 4)] * 2
    cached = describe.describe(config(mixers={"attention": dict(heads=2)}), [16, 64])["lengths"]
    inner = dict(inner="s5", options=dict(state_size=6))
    trained = describe.describe(config(pattern=("tuned_state",), mixers={"tuned_state": inner}), [16])
    assert trained["lengths"][0]["state_bytes"] == record["lengths"][0]["state_bytes"]
    keys_and_values = 2 * 2 * 8 * 4
    assert cached[1]["state_bytes"] - cached[0]["state_bytes"] >= 48 * keys_and_values


def test_a_length_that_the_model_refuses_says_why():
    mixers = {"linformer": dict(max_length=32, heads=2, projected=4)}
    record = describe.describe(config(pattern=("linformer",), mixers=mixers), [32, 64])
    assert record["lengths"][0]["flops"] > 0
    assert "max_length=32" in record["lengths"][1]["refused"]
    assert "max_length=32" in describe.table(record).splitlines()[-3]


def test_an_alias_and_an_inner_mixer_are_named():
    mixers = {"both": dict(mixer="bidirectional", inner="mamba"), "bidirectional": dict(inner="s5")}
    record = describe.describe(config(pattern=("both", "bidirectional"), mixers=mixers), [16])
    assert [row["mixer"] for row in record["layers"]] == ["both (bidirectional mamba)", "bidirectional s5"]


def test_implementations_say_why_nothing_faster_is_taken():
    hybrid = config(width=64, pattern=("retnet", "attention"), dtype="bfloat16")
    hybrid["model"]["mixers"] = {"retnet": dict(heads=2), "attention": dict(heads=2)}

    def taken(backend, length):
        rows = describe.implementations(hybrid, length, 32, backend)
        assert [row["mixer"] for row in rows] == ["retnet", "attention"]
        calls = [{call["primitive"]: call for call in row["calls"]} for row in rows]
        return (
            calls[0]["gated_linear_attention"],
            calls[1]["attention"],
            describe.implementations_text(rows, backend),
        )

    recurrent, attention, _ = taken("gpu", 128)
    assert recurrent["implementation"] == "gpu"
    assert attention["implementation"] == "cudnn"
    recurrent, _, text = taken("gpu", 32)
    assert recurrent["implementation"] == "xla"
    assert "not gpu: q has 32 tokens; a chunk has" in text
    recurrent, attention, _ = taken("cpu", 128)
    assert (recurrent["implementation"], attention["implementation"]) == ("xla", "xla")
    assert "needs a Hopper GPU" in dict(recurrent["passed_over"])["gpu"]


@pytest.mark.parametrize("entry", MIXERS)
def test_every_mixer_can_be_described(entry):
    name, options = MIXERS[entry]
    mixer = nnx.eval_shape(lambda: make_mixer(name, options, given={"width": 8}, rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(mixer)
    x = jax.ShapeDtypeStruct((1, 16, 8), jnp.float32)
    flops = count_flops(lambda variables, x: nnx.merge(graph, variables)(x)[0], variables, x)
    assert flops.total > 16 * 8


@pytest.mark.parametrize(
    "given, lengths, message",
    [
        (config() | dict(task=dict(name="listop")), [8], "did you mean 'listops'"),
        (config(pattern=("s6",)), [8], "unknown mixer 's6'"),
        (config(vocab_size=3), [8], "config.model sets vocab_size"),
        (config(), [], "lengths="),
        (config(), [0], "lengths="),
    ],
)
def test_what_makes_no_sense_is_refused(given, lengths, message):
    with pytest.raises(ValueError, match=message):
        describe.describe(given, lengths)


@pytest.mark.parametrize(
    "value, text", [(0, "0 "), (999, "999 "), (1234, "1.23 k"), (999_700, "1 M"), (5e16, "50 P")]
)
def test_numbers_are_short(value, text):
    assert describe._si(value) == text


def run(*arguments):
    command = [sys.executable, "-m", "experiments.describe", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command():
    path = "--config=configs/lra/listops_short.py:mixer=s5"
    done = run(path, "--lengths=64", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [row["length"] for row in record["lengths"]] == [64]
    assert f"{record['parameters']:,} parameters" in describe.table(record)
    assert run(path, "--lengths=many").returncode == 2


def test_a_layer_that_reads_values_of_the_first_one_is_described_by_itself():
    sizes = dict(mixer="rwkv7", head_dim=4, decay_rank=2, rate_rank=2, gate_rank=2)
    later = sizes | dict(value_residual=True, value_rank=2)
    given = config(pattern=("first", "later"), mixers={"first": sizes, "later": later}, pooling="last")
    first, second = describe.describe(given, [16])["layers"]
    assert second["flops_per_token"] > first["flops_per_token"] > 0
    rows = describe.implementations(given, length=16, batch=2, backend="cpu")
    assert [call["primitive"] for call in rows[1]["calls"]] == ["short_conv", "dplr_delta_rule"]


@pytest.mark.slow
def test_models_that_name_items_or_carry_a_memory():
    """Both stacks of the first, and the memory of the second, which does not grow."""
    pointing = config(kind="pointer_network", depth=1, mixer_defaults=dict(heads=2), encoder=dict(depth=2))
    pointing["task"] = dict(name="convex_hull")
    assert [row["layer"] for row in describe.describe(pointing, [8])["layers"]] == [0, 1, 2]
    options = dict(kind="recurrent_memory", depth=1, mixer_defaults=dict(heads=2), memory=3, segment=4)
    given = config(**options)
    given["task"] = dict(name="copy")
    found = describe.describe(given, [8, 16])["lengths"]
    assert [row["state_bytes"] for row in found] == [4 * 3 * 8] * 2
    own = dict(kind="hierarchical_memory", memory=1, recall=5, sensory=2)
    given["model"] |= own
    assert describe.describe(given, [8])["lengths"][0]["state_bytes"] == 4 * (5 + 2) * 8


def test_both_stacks_of_an_encoder_decoder_and_what_its_state_holds_of_a_source():
    shared = dict(layers=(0,), mixer=dict(heads=2, causal=False))
    options = dict(kind="encoder_decoder", mixer_defaults=dict(heads=2, position="none"), depth=1)
    given = config(**options, encoder=dict(depth=2, pattern=("s5",), shared=shared))
    given["task"] = dict(name="copy_source", symbols=14)
    record = describe.describe(given, [16])
    model = build_model(given["model"] | dict(vocab_size=16), rngs=nnx.Rngs(0))

    def parameters(part):
        return sum(p.size for p in jax.tree.leaves(nnx.state(part, nnx.Param)))

    blocks = [*model.encoder.blocks, *model.decoder.stack.blocks]
    assert [row["parameters"] for row in record["layers"]] == [parameters(block) for block in blocks]
    assert [row["mixer"] for row in record["layers"]] == ["s5", "s5", "attention"]
    assert record["shared_blocks"]["parameters"] == parameters(model.encoder.shared)
    assert record["embedding_and_head"]["parameters"] == parameters(
        [model.decoder.embedding, model.decoder.norm, model.encoder_norm]
    )
    state = jax.eval_shape(lambda: model.init_state(jnp.zeros((1, 16), jnp.int32), max_length=16))
    assert record["lengths"][0]["state_bytes"] == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.layers, state.sources))
    )
    # Keys and values of 16 tokens of the source and of the target, at least.
    assert record["lengths"][0]["state_bytes"] > 2 * 2 * 16 * 8 * 4
