"""The command long_context on a tiny run: what it prints and writes, and what it refuses."""

import json

import numpy as np
import pytest

from experiments import long_context
from experiments import train as train_command
from experiments.data.retrieval_prompts import Prompt, score
from experiments.training.trained import open_run

CONFIG = """
from ml_collections import ConfigDict


def get_config(arg=""):
    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="language", source=arg.partition("=")[2], length=16, test=4, validation=4)
    config.model = dict(kind="language_model", width=8, depth=1, pattern=("mamba2",), scan=False)
    config.model.mixers = {"mamba2": dict(head_dim=8, state_size=8)}
    config.model.channel = "none"
    config.optimizer = dict(learning_rate=1e-2)
    config.train = dict(batch_size=2, steps=2, tensorboard=False)
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long_context")
    texts = folder / "text.txt"
    texts.write_text("".join(f"Text {number}: all work and no play.\n" for number in range(200)))
    (folder / "config.py").write_text(CONFIG)
    workdir = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMODELS_DATA", str(folder / "data"))
        assert (
            train_command.main(
                [f"--config={folder / 'config.py'}:source={texts}", f"--workdir={workdir}", "--num_devices=1"]
            )
            == 0
        )
        yield workdir


@pytest.mark.slow
def test_what_it_prints_and_writes(run, capsys):
    arguments = ["--positions=40", "--rows=2", "--tasks=passkey,niah_multivalue", "--lengths=400"]
    assert long_context.main([f"--workdir={run}", *arguments, "--examples=3", "--batch=2"]) == 0
    out = capsys.readouterr().out
    assert "32-40 *" in out
    assert "passkey                 400 tokens" in out
    step = open_run(str(run), "best").step
    record = json.loads((run / f"long-context-{step}.json").read_text())
    assert record["trained_length"] == 16
    ranges = record["positions"]
    assert [row["first"] for row in ranges] == [1, 2, 4, 8, 16, 17, 32]
    assert sum(row["count"] for row in ranges) == 2 * 40
    assert [one["task"] for one in record["retrieval"]] == ["passkey", "niah_multivalue"]
    for one in record["retrieval"]:
        again = [score(Prompt(e["prompt"], tuple(e["answers"])), e["output"]) for e in one["examples"]]
        assert len(again) == 3
        assert one["score"] == pytest.approx(np.mean(again))


def test_refusals(run, capsys):
    for arguments, said in (
        ([], "give --positions=LENGTH, --tasks=NAMES, or both"),
        (["--tasks=passkey", "--lengths=20"], "length=20: the shortest prompt of passkey has"),
        (["--positions=100000"], "length=100000, but all documents together have"),
        (["--positions=8", "--examples=3"], "--examples has no effect without --tasks"),
        (["--tasks=passkey", "--rows=3"], "--rows has no effect without --positions"),
        (["--positions=8", "--checkpoint=7"], "checkpoint=7: there is no such checkpoint"),
    ):
        assert long_context.main([f"--workdir={run}", *arguments]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        long_context.main([f"--workdir={run}", "--tasks=pass_key"])
    assert left.value.code == 2
    assert "unknown task 'pass_key'; did you mean 'passkey'?" in capsys.readouterr().err
