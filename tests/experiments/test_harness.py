"""The command that evaluates a run on tasks of lm-evaluation-harness, with a stand-in for the library."""

import json
import sys
import types

import pytest

from experiments import harness
from experiments import train as train_command

CONFIG = """
from ml_collections import ConfigDict


def get_config(arg=""):
    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="language", source="SOURCE", length=32, data_dir="DATA")
    config.model = dict(kind="language_model", width=16, depth=1, pattern=("lru",), channel="none")
    config.model.mixer_defaults = dict(state_size=8)
    config.optimizer = dict(learning_rate=0.03, warmup_steps=1)
    config.train = dict(batch_size=8, steps=100, eval_every=10.0, log_every=50, tensorboard=False)
    return config
"""


def run_of(folder):
    """Returns the folder of a run whose model has learned lines of abc."""
    (folder / "text.txt").write_text("abc\n" * 1500)
    config = CONFIG.replace("SOURCE", str(folder / "text.txt")).replace("DATA", str(folder / "data"))
    (folder / "config.py").write_text(config)
    arguments = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}", "--num_devices=1"]
    assert train_command.main(arguments) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("harness"))


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def library(monkeypatch):
    """A library with one task, which asks the model all that it can be asked."""

    class LM:
        pass

    class TaskManager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "mine"]

    asked = {}

    def evaluate(model, **options):
        assert isinstance(model, LM)
        asked.update(options)
        pairs = [Request("abc\nab", "c\n"), Request("abc\nab", "b\n"), Request("", "abc")]
        asked["scores"] = model.loglikelihood(pairs)
        asked["rolling"] = model.loglikelihood_rolling([Request("abc\nabc\n")])
        asked["texts"] = model.generate_until([Request("abc\na", dict(until=["\n"], max_gen_toks=8))])
        return dict(results=dict(mine=dict(score=1.0)), configs=dict(mine=dict(function=len)))

    modules = {
        "lm_eval": dict(__version__="0", simple_evaluate=evaluate),
        "lm_eval.api": {},
        "lm_eval.api.model": dict(LM=LM),
        "lm_eval.tasks": dict(TaskManager=TaskManager),
        "lm_eval.utils": dict(make_table=lambda found: "the table", handle_non_serializable=str),
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.mark.slow
def test_a_run_is_evaluated(run, library, capsys):
    assert harness.main([f"--workdir={run}", "--tasks=mine", "--limit=5", "--num_fewshot=2"]) == 0
    assert capsys.readouterr().out.endswith("the table\n")
    assert (library["tasks"], library["limit"], library["num_fewshot"]) == (["mine"], 5, 2)
    (right, wrong, start), (whole,) = library["scores"], library["rolling"]
    assert right[1] > wrong[1]
    assert right[0] > -0.2 > wrong[0]
    # Nothing follows the end of a document in this run, so that a text begins as a line does.
    assert start[0] > -0.2
    assert -0.5 < whole < 0
    assert library["texts"] == ["bc"]
    (file,) = run.glob("harness-*.json")
    record = json.loads(file.read_text())
    assert record["results"] == dict(mine=dict(score=1.0))
    assert (record["lm_eval"], record["limit"]) == ("0", 5)


def test_refusals(run, library, capsys, monkeypatch):
    for arguments, message in (
        (["--tasks=mine,yours"], "lm-evaluation-harness has no task 'yours'; --include_path names"),
        (["--tasks="], "--tasks= is empty"),
        (["--tasks=mine", "--checkpoint=7"], "checkpoint=7: there is no such checkpoint"),
    ):
        assert harness.main([f"--workdir={run}", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert harness.main([f"--workdir={run}", "--tasks=mine"]) == 2
    assert "pip install 'jax-seqmodels[eval]'" in capsys.readouterr().err
