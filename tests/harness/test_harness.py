"""lm-evaluation-harness on tasks that are made here: the library scores what the model answers."""

import json
import math

import numpy as np
import pytest

from experiments import harness
from tests.experiments.test_harness import run_of

TASKS = {
    "choose": dict(
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[dict(metric="acc"), dict(metric="acc_norm")],
    ),
    "perplexity": dict(
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[dict(metric="byte_perplexity"), dict(metric="bits_per_byte")],
    ),
    "continue": dict(
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{wanted}}",
        generation_kwargs=dict(until=["\n"], max_gen_toks=8),
        metric_list=[dict(metric="exact_match")],
    ),
}
# The model has learned lines of abc.
DOCUMENTS = [
    dict(question="abc\nab", choices=["c\n", "b\n"], answer=0, wanted="c"),
    dict(question="abc\nabc\n", choices=["cab", "abc"], answer=1, wanted="abc"),
    dict(question="abc\na", choices=["bc", "ca"], answer=0, wanted="wrong"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run"))


def test_tasks_of_a_folder(run, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, options in TASKS.items():
        files = dict(test=str(tmp_path / "data.jsonl"))
        task = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=files), test_split="test")
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task | options))  # JSON is YAML
    command = [f"--workdir={run}", f"--include_path={tmp_path}", f"--tasks={','.join(TASKS)}", "--batch=2"]
    assert harness.main(command) == 0
    assert "choose" in capsys.readouterr().out
    (file,) = run.glob("harness-*.json")
    results = json.loads(file.read_text())["results"]
    assert results["choose"]["acc,none"] == 1.0
    assert results["continue"]["exact_match,none"] == pytest.approx(2 / 3)
    lm = harness.make_lm(harness.open_run(str(run), "best"))

    class Request:
        def __init__(self, *args):
            self.args = args

    texts = [document["question"] for document in DOCUMENTS]
    total = sum(lm.loglikelihood_rolling([Request(text) for text in texts]))
    bits = -total / math.log(2) / sum(map(len, texts))
    assert results["perplexity"]["bits_per_byte,none"] == pytest.approx(bits)
    assert np.isfinite(bits)
    assert bits < 0.5


def test_an_unknown_task_is_refused(run, capsys):
    assert harness.main([f"--workdir={run}", "--tasks=no_such_task"]) == 2
    assert "lm-evaluation-harness has no task 'no_such_task'" in capsys.readouterr().err
