"""Published checkpoints in commands: evaluation on the task of a config, and training that starts from one."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import evaluate, train
from experiments.config.command_line import load
from experiments.parallel.mesh import Devices
from experiments.training import experiment
from experiments.training.pretrained import initial_state
from seqmodels import load_pretrained
from seqmodels.names import by_layer

CHECKPOINT = Path(__file__).parents[1] / "seqmodels" / "interop" / "data" / "llama"
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="language", source="FOLDER/text.txt", data_dir="FOLDER/data", tokenizer="characters",
        length=16, packing="concatenate", train=16, validation=4, test=4,
    )
    config.model = dict(kind="language_model", dropout=0.1)
    config.train = dict(batch_size=4, steps=2, eval_every=100.0, log_every=1, tensorboard=False)
    config.optimizer = dict(learning_rate=1e-2, warmup_steps=1, schedule="constant", ema=0.5)
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "config.py").write_text(CONFIG.replace("FOLDER", str(folder)))
    lines = ("abcdefgh"[n % 5 :] + " " + "hgfedcba"[n % 7 :] for n in range(400))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    return folder


def opened(folder, *overrides):
    config = load(f"{folder}/config.py", [("train.pretrained", str(CHECKPOINT)), *overrides])
    plan = experiment.build(config)
    devices = Devices.first(1)
    return plan, devices, plan.step_functions(devices).layout


def test_a_checkpoint_is_evaluated(folder, capsys):
    arguments = [f"--pretrained={CHECKPOINT}", f"--config={folder}/config.py", "--num_devices=1"]
    assert evaluate.main([*arguments, "--config.model.dtype=float32"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pretrained"] == str(CHECKPOINT)
    model, _ = load_pretrained(CHECKPOINT)
    plan, *_ = opened(folder)
    (batch,) = plan.eval_batches("test")
    run = jax.jit(lambda ids, segments: model(ids, segment_ids=segments)[0])
    log_p = np.asarray(jax.nn.log_softmax(run(batch["inputs"], batch["segment_ids"])))
    counted = batch["labels"] >= 0
    chosen = np.take_along_axis(log_p, np.where(counted, batch["labels"], 0)[..., None], axis=-1)[..., 0]
    want = -np.mean(chosen[counted])
    np.testing.assert_allclose(printed["loss"], want, rtol=1e-5)


def test_training_starts_from_the_parameters(folder):
    plan, devices, layout = opened(folder, ("model.scan", "false"))
    state = initial_state(plan, layout, devices)
    assert plan.config["model"]["dropout"] == 0.1
    assert plan.config["model"]["vocab_size"] == 40 > plan.task.vocab_size
    want = by_layer(load_pretrained(CHECKPOINT)[0])
    stored = layout.to_stored(state)
    for name, array in want.items():
        for copy in ("parameters", "average"):
            np.testing.assert_array_equal(stored[f"{copy}/{name}"], array, err_msg=name)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))


@pytest.mark.slow
def test_training_and_resuming(folder, tmp_path, capsys):
    arguments = [f"--config={folder}/config.py", f"--config.train.pretrained={CHECKPOINT}"]
    arguments += [f"--workdir={tmp_path}", "--num_devices=1"]
    assert train.main(arguments) == 0
    assert train.main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
    assert evaluate.main([f"--workdir={tmp_path}", "--num_devices=1"]) == 0
    trained = json.loads(capsys.readouterr().out)["loss"]
    assert evaluate.main([f"--pretrained={CHECKPOINT}", *arguments[:1], "--num_devices=1"]) == 0
    assert trained < json.loads(capsys.readouterr().out)["loss"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([("model.width", "8")], "config.model.width=8, but the checkpoint config.train.pretrained="),
        ([("model.logit_cap", "8")], "has no logit_cap; leave it out"),
        (
            [("train.pretrained", "nowhere")],
            "config.train.pretrained='nowhere': folder='nowhere' is no folder",
        ),
    ],
)
def test_models_that_the_checkpoint_does_not_have(folder, overrides, message):
    with pytest.raises(ValueError) as caught:
        opened(folder, *overrides)
    assert message in str(caught.value)


def test_a_task_of_more_tokens_than_the_checkpoint(folder):
    with pytest.raises(
        ValueError, match=r"has 257 tokens, but the checkpoint .* vocab_size=40; use its tokenizer"
    ):
        opened(folder, ("task.tokenizer", "bytes"))


def test_what_evaluation_needs(folder, capsys):
    for arguments, message in (
        ([], "expected one of --workdir and --pretrained"),
        (["--workdir=a", "--pretrained=b"], "expected one of --workdir and --pretrained"),
        ([f"--pretrained={CHECKPOINT}"], "--pretrained needs --config"),
        (["--workdir=a", "--config=b"], "--workdir has its own config"),
    ):
        assert evaluate.main(arguments) == 2
        assert message in capsys.readouterr().err
