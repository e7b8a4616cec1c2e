"""Studies, their tables, and the command that resumes where it left."""

import json

import jax
import pytest
from flax import nnx

from experiments import sweep
from experiments.config.loading import TrainConfig, section
from experiments.sweep import __main__ as command
from experiments.sweep.report import summarize, table
from experiments.sweep.studies import STUDIES
from experiments.sweep.study import Job, Study
from experiments.tasks import make_task
from experiments.training.experiment import model_without_data
from seqmodels import build_model

TINY = {
    "task.train": 40,
    "task.validation": 10,
    "task.test": 10,
    "task.lengths": (2, 6),
    "task.extrapolate": (7, 9),
    "train.steps": 4,
    "train.batch_size": 4,
    "model.width": 4,
    "model.mixer_defaults": {"state_size": 4},
    "optimizer.warmup_steps": 1,
}
JOBS = tuple(
    Job(
        row, f"algorithms:mixer={row},width=8", TINY, (1e-3, 1e-2), (0, 1), {"7": "length_7", "9": "length_9"}
    )
    for row in ("s5", "lru")
)
BY_DEFAULT = ("induction", "parity", "width_transfer")
STUDY = Study("Tiny", JOBS, chance=0.5, axis="length")


# Large studies take seconds to build.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in BY_DEFAULT)) for name in STUDIES]
)
def test_every_job_of_every_study_can_be_built(name):
    study = STUDIES[name]()
    kinds = set()
    for job in study.jobs:
        config = job.plain_config()
        assert section(config, "train", TrainConfig).steps % sweep.replicas.STEPS_AT_ONCE == 0
        task = dict(config["task"])
        splits = make_task(task.pop("name"), **task).splits
        assert {study.place(job, column)[0] for column in job.columns} <= set(splits)
        assert study.axis is None or all(column.isdecimal() for column in job.columns)
        kind = json.dumps(config["model"])
        if kind not in kinds:
            model_without_data(config)
        kinds.add(kind)
        assert config["optimizer"]["warmup_steps"] < config["train"]["steps"]
    assert len({(job.row, column) for job in study.jobs for column in job.columns}) == sum(
        len(job.columns) for job in study.jobs
    )


def record(row, rate, seed, validation, **test):
    return dict(row=row, learning_rate=rate, seed=seed, validation=validation, test=test)


def test_the_best_rate_is_chosen_by_validation():
    study = Study("T", JOBS, average=True, chance=0.5)
    records = [
        record("s5", 0.1, 0, 0.9, **{"7": 0.5, "9": 0.4}),
        record("s5", 0.1, 1, 0.7, **{"7": 0.7, "9": 0.4}),
        record("s5", 0.2, 0, 0.8, **{"7": 1.0, "9": 1.0}),
        record("s5", 0.2, 1, 0.7, **{"7": 1.0, "9": 1.0}),
        record("lru", 0.2, 0, 0.8, **{"7": 0.125}),
    ]
    cells = summarize(study, records)
    assert cells["s5"]["7"] == (pytest.approx(0.6), pytest.approx(0.2), (0.1,))
    assert cells["s5"]["9"] == (pytest.approx(0.4), 0.0, (0.1,))
    lines = table(study, cells).splitlines()
    assert "| s5 | 60.0 (20.0) | 40.0 | 50.0 | 0.1 |" in lines
    assert "| lru | 12.5 |  |  | 0.2 |" in lines
    assert lines[-1] == "Guessing gives 50.0."


def test_of_losses_the_least_is_best_and_trivial_predictors_have_rows():
    job = Job("gla", "linear_regression", {}, (0.1, 0.2), (0, 1), {"3": "test:error_after_3"})
    study = Study("T", (job,), metric="loss", lower=True, beside={"one step": "step_after_{}"})
    assert study.place(job, "3") == ("test", "error_after_3")
    found = {"baselines": {"test": {"step_after_3": 0.5}}}
    records = [
        record("gla", 0.1, 0, 0.5, **{"3": 0.25}) | found,
        record("gla", 0.1, 1, 0.75, **{"3": 0.125}) | found,
        record("gla", 0.2, 0, 0.75, **{"3": 0.0}) | found,
        record("gla", 0.2, 1, float("nan"), **{"3": 0.0}) | found,
    ]
    cells = summarize(study, records)
    assert cells["gla"]["3"] == (0.1875, 0.125, (0.1,))
    lines = table(study, cells).splitlines()
    assert "| gla | 0.188 (0.125) | 0.1 |" in lines
    assert "| one step | 0.500 |  |" in lines


@pytest.mark.slow
def test_states_have_the_features_that_their_columns_say():
    doubled = {"mlstm": 2, "mamba": 2, "mamba2": 2, "mamba3": 2, "sse": 5}
    for job in STUDIES["recall_state"]().jobs:
        (features,) = map(int, job.columns)
        if job.row == "atlas" or features not in (8, 64):
            continue
        config = job.plain_config()["model"] | {"vocab_size": 2}
        state = jax.eval_shape(
            lambda config=config: build_model(config, rngs=nnx.Rngs(0)).init_state(1, max_length=8)
        )
        largest = max(array.size for array in jax.tree.leaves(state))
        # Some keep a sum of keys, or the last values, beside the state in the same array.
        assert 0.9 <= largest / (features * 128 * doubled.get(job.row, 1)) <= 1.2, job.row


def test_columns_are_merged():
    jobs = tuple(
        Job("s5", "algorithms:", {}, (1e-3,), (0, 1), {column: "test"})
        for column in ("a: 1", "a: 2", "b: 1", "c: 1", "c: 2")
    )
    study = Study("T", jobs, average=True, merged=True)
    records = [
        record("s5", rate, seed, value, **{column: value})
        for column, rate, values in (
            ("a: 1", 0.1, (0.5, 0.7)), ("a: 2", 0.2, (1.0, 1.0)), ("b: 1", 0.1, (0.3, 0.3)), ("c: 1", 0.1, (1.0, 1.0))
        )
        for seed, value in enumerate(values)
    ]  # fmt: skip
    cells = summarize(study, records)["s5"]
    assert cells == {"a": (pytest.approx(0.8), pytest.approx(0.1), (0.1, 0.2)), "b": (0.3, 0.0, (0.1,))}
    assert "| s5 | 80.0 (10.0) | 30.0 |  |  | 0.1, 0.2 |" in table(study, {"s5": cells})
    records.append(record("s5", 0.1, 0, 0.5, **{"c: 2": 0.5}))
    assert "| s5 | 80.0 (10.0) | 30.0 | 75.0 | 61.7 | 0.1, 0.2 |" in table(study, summarize(study, records))


@pytest.mark.slow
def test_the_command_resumes_where_it_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.STUDIES, "parity", lambda: STUDY)
    arguments = ["--study=parity", f"--out={tmp_path}"]
    assert command.main([*arguments, "--stop_after_seconds=1e-9"]) == 75
    assert "2 of 2 jobs are left" in capsys.readouterr().err
    assert command.main([*arguments, "--rows=lru"]) == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 4
    first = json.loads(lines[0])
    assert first["row"] == "lru"
    assert set(first["test"]) == {"7", "9"}
    assert len(first["losses"]) == 2
    assert first["config"]["train"]["steps"] == 4

    def fail(*_):
        raise ValueError("too large")

    monkeypatch.setattr(command, "_train", fail)  # nothing is trained again
    assert command.main([*arguments, "--rows=lru"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 jobs are done" in out
    assert out.endswith((tmp_path / "table.md").read_text() + "\n")
    assert "4 runs on 1 x" in out
    assert "Jobs not run: 1." in out
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert command.main([*arguments, "--rows=lru", "--steps=2"]) == 1  # other settings are other runs
    assert "lru failed: too large" in capsys.readouterr().err


def test_errors(tmp_path, capsys):
    assert command.main(["--study=mqar", f"--out={tmp_path}", "--rows=mamba7"]) == 2
    assert "rows='mamba7'; expected some of attention; deltanet" in capsys.readouterr().err


def test_damaged_lines_are_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.STUDIES, "parity", lambda: STUDY)

    def records(job):
        return [
            dict(
                **record(job.row, rate, seed, float("nan") if seed else 0.5, **{"7": 0.5, "9": 0.25}),
                config=job.plain_config(),
                device="1 x cpu",
                versions={"jax": "1"},
                seconds_together=dict(compiling=0, training=0),
            )
            for rate in job.rates
            for seed in job.seeds
        ]

    trained = []
    monkeypatch.setattr(command, "_prepare", lambda job: job)
    monkeypatch.setattr(
        command, "_train", lambda study, job, _, deadline: trained.append(job.row) or records(job)
    )
    arguments = ["--study=parity", f"--out={tmp_path}"]
    assert command.main(arguments) == 0
    file = tmp_path / "runs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    whole = (tmp_path / "table.md").read_text()
    # The first job loses a line in part, and the end of the file is cut.
    file.write_text("".join([lines[0], lines[1][:50] + "\n", *lines[2:], '{"row": "s5", "conf']))
    capsys.readouterr()
    assert command.main(arguments) == 0
    err = capsys.readouterr().err
    assert f"{file}, line 2: the line is cut or damaged" in err
    assert f"{file}, line 9: " in err
    assert trained == ["s5", "lru", "s5"]
    assert (tmp_path / "table.md").read_text() == whole
    assert len(command._known(file)[0]) == 11


def test_a_job_that_cannot_be_built_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.STUDIES, "parity", lambda: STUDY)

    def prepare(job):
        raise TypeError("no such option")

    monkeypatch.setattr(command, "_prepare", prepare)
    assert command.main(["--study=parity", f"--out={tmp_path}"]) == 1
    assert "2 of 2 jobs failed" in capsys.readouterr().err
