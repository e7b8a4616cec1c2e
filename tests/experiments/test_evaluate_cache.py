"""The command evaluate with a policy of the caches of attention."""

import json

import numpy as np
import pytest

from experiments import evaluate
from experiments import train as train_command

CONFIG = """
from ml_collections import ConfigDict


def get_config(arg=""):
    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="language", source=arg.partition("=")[2], length=24, test=5, validation=4)
    config.model = dict(kind="language_model", width=8, depth=2, pattern=("attention", "lru"), scan=True)
    config.model.mixers = {"lru": dict(state_size=4), "attention": dict(heads=2)}
    config.model.channel = "none"
    config.optimizer = dict(learning_rate=1e-1)
    config.train = dict(batch_size=2, steps=8, tensorboard=False)
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate_cache")
    texts = folder / "text.txt"
    # Documents that are shorter and longer than half a row, side by side in rows.
    words = ["play " * (1 + number % 7) + chr(97 + number % 26) for number in range(300)]
    texts.write_text("\n\n".join(words))
    (folder / "config.py").write_text(CONFIG)
    workdir = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMODELS_DATA", str(folder / "data"))
        arguments = [f"--config={folder / 'config.py'}:source={texts}", f"--workdir={workdir}"]
        assert train_command.main([*arguments, "--num_devices=1"]) == 0
        yield workdir


def measured(run, capsys, *arguments):
    capsys.readouterr()
    assert evaluate.main([f"--workdir={run}", "--num_devices=1", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_policy_in_evaluation(run, capsys):
    plain = measured(run, capsys)
    for text in ("full", "snapkv(budget=24, window=4)", "sirllm(budget=24, sinks=2, recent=3)"):
        found = measured(run, capsys, f"--cache={text}")
        for name in ("loss", "bits_per_byte", "accuracy"):
            np.testing.assert_allclose(found[name], plain[name], rtol=1e-5)
        assert found["examples"] == plain["examples"]
        assert ("after_prompt" in found) == (text != "full")
    for text in ("snapkv(budget=2, window=1)", "sirllm(budget=2, sinks=1, recent=1)"):
        small = measured(run, capsys, f"--cache={text}")
        after, whole = small["after_prompt"], found["after_prompt"]
        assert after["examples"] == whole["examples"] < plain["examples"]
        assert abs(after["loss"] - whole["loss"]) > 1e-4
        # What the policy changes stands behind the prompt.
        difference = after["examples"] * (after["loss"] - whole["loss"])
        np.testing.assert_allclose(
            difference, plain["examples"] * (small["loss"] - plain["loss"]), rtol=1e-2, atol=1e-4
        )
    # Each budget has a file of its own.
    files = run.glob(f"evaluation-test-{small['step']}-sirllm-*.json")
    records = [json.loads(file.read_text()) for file in files]
    assert len(records) == 2
    assert small in records
    assert small["cache"] == "SirLLM(budget=2, sinks=1, recent=1)"


@pytest.mark.slow
def test_refusals(run, capsys):
    for arguments, said in (
        (["--cache=snapkv"], "--cache: budget=2048 of the cache is more than the 24 tokens"),
        (["--cache=full", "--num_devices=2"], "--num_devices=2 with --cache; expected 1 device"),
    ):
        assert evaluate.main([f"--workdir={run}", *arguments]) == 2
        assert said in capsys.readouterr().err
