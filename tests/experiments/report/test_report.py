"""Reports on run directories that are written by hand, and on tiny runs of Text and Retrieval from official files."""

import json

import pytest

from experiments import train
from experiments.report import __main__ as report
from experiments.report import tables
from experiments.report.published import PUBLISHED, TASKS
from experiments.report.runs import read
from experiments.runs.files import to_json_text

OPTIONS = {
    "ListOps": dict(name="listops", preset="full"),
    "Text": dict(name="imdb", official_dir="x", vocabulary="characters"),
    "Retrieval": dict(name="aan", official_dir="x", vocabulary="characters"),
    "Image": dict(name="cifar10", official_dir="x"),
    "Pathfinder": dict(name="pathfinder", size=32),
    "Path-X": dict(name="pathfinder", size=128),
}


def write_run(folder, task, *, accuracy=None, mixer="s5", protocol="s4", seed=0, width=8, curve=(0.2, 0.4)):
    """Writes what training leaves: two steps an epoch, an evaluation after each, ten seconds a step."""
    folder.mkdir(parents=True)
    config = dict(
        seed=seed,
        task=task,
        model=dict(kind="classifier", width=width, depth=1, pattern=(f"{mixer}+mlp",)),
        optimizer=dict(learning_rate=1e-3),
        train=dict(batch_size=4, epochs=len(curve), protocol=protocol),
        data={},
        mesh={},
    )
    lines = []
    for number, value in enumerate(curve, start=1):
        lines += [
            dict(kind="train", step=2 * number, epoch=number, loss=1.0, seconds=20.0 * number),
            dict(kind="validation", step=2 * number, epoch=number, accuracy=value, seconds=1.0),
        ]
    (folder / "config.json").write_text(to_json_text(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if accuracy is not None:
        results = dict(
            selection=["accuracy", "max"],
            best_step=2,
            validation=dict(accuracy=max(curve)),
            test=dict(accuracy=accuracy),
            steps=2 * len(curve),
            steps_per_epoch=2,
            parameters=1234,
            tokens_per_second=5000.0,
            training_seconds=20.0 * len(curve),
            compile_seconds=3.0,
            devices="1 x cpu",
        )
        (folder / "results.json").write_text(to_json_text(results))
    return folder


def rows_of(text):
    return [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]


def test_ours_stand_beside_published_and_averages_follow_one_rule(tmp_path):
    for number, (task, options) in enumerate(OPTIONS.items()):
        write_run(tmp_path / f"runs/{task}", options, accuracy=0.5 + number / 100)
    write_run(tmp_path / "runs/second", OPTIONS["ListOps"], accuracy=0.6, seed=1)
    found = tables.lra_tables(read([tmp_path / "runs"]))
    assert list(found) == ["s4"]
    row = found["s4"]["s5"]
    assert row["ours"] == pytest.approx(dict(zip(TASKS, (55.0, 51, 52, 53, 54, 55), strict=True)))
    assert (row["seeds"]["ListOps"], row["spread"]["ListOps"]) == (2, pytest.approx(10.0))
    assert row["averages"]["ours"] == pytest.approx(dict(five=53.0, six=320 / 6))
    assert row["averages"]["published"]["six"] == pytest.approx(87.46, abs=0.05)  # as the paper averages
    text = tables.lra_markdown("s4", found["s4"])
    cells = next(line for line in rows_of(text) if line[0] == "s5")
    assert cells[1] == "55.00 (2 seeds, spread 10.00) / 62.15"
    assert cells[6] == "55.00 / 98.58"
    assert next(line for line in rows_of(text) if line[0] == "mega")[2] == "– / 90.43"


def test_the_average_of_the_benchmark_is_over_five_tasks_and_a_failure_is_chance():
    values = dict(zip(TASKS, PUBLISHED["lra"]["attention"], strict=True))
    assert tables.averages(values) == pytest.approx(dict(five=54.39, six=(5 * 54.39 + 50) / 6), abs=0.01)
    assert tables.averages({task: value for task, value in values.items() if task != "Text"}) == dict(
        five=None, six=None
    )


def test_protocols_and_other_data_never_share_a_column(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "a", OPTIONS["Image"], accuracy=0.8)
    write_run(
        runs / "b", OPTIONS["Image"] | dict(inputs="tokens"), accuracy=0.4, mixer="attention", protocol="lra"
    )
    write_run(runs / "c", OPTIONS["Image"] | dict(inputs="tokens"), accuracy=0.3)
    write_run(runs / "d", OPTIONS["Image"] | dict(inputs="colour"), accuracy=0.9)
    write_run(runs / "e", OPTIONS["Text"] | dict(length=16), accuracy=0.7)
    write_run(runs / "f", OPTIONS["ListOps"] | dict(preset="short"), accuracy=0.6, protocol=None)
    write_run(runs / "g", OPTIONS["Image"], accuracy=0.1, protocol=None)
    found = read([runs])
    assert {run.name: run.task for run in found} == dict(
        a="Image",
        b="Image",
        c="Image (inputs=tokens)",
        d="Image (inputs=colour)",
        e="Text (length=16)",
        f="ListOps (preset=short)",
        g="Image (inputs=grey)",
    )
    lra = tables.lra_tables(found)
    assert {
        protocol: {m: r["ours"] for m, r in rows.items() if r["ours"]} for protocol, rows in lra.items()
    } == {
        "s4": {"s5": {"Image": pytest.approx(80.0)}},
        "lra": {"attention": {"Image": pytest.approx(40.0)}},
    }


def test_recipes_that_differ_are_not_averaged(tmp_path):
    write_run(tmp_path / "runs/a", OPTIONS["Text"], accuracy=0.8)
    write_run(tmp_path / "runs/b", OPTIONS["Text"], accuracy=0.6, width=16)
    rows = tables.lra_tables(read([tmp_path / "runs"]))["s4"]
    assert [rows[label]["ours"]["Text"] for label in ("s5", "s5 (2)")] == pytest.approx([80.0, 60.0])
    assert rows["s5 (2)"]["published"]["Text"] == 89.31


def test_accuracy_by_epoch_and_by_seconds(tmp_path):
    write_run(tmp_path / "runs/long", OPTIONS["Text"], accuracy=0.8, curve=(0.1, 0.3, 0.2, 0.4, 0.5))
    write_run(tmp_path / "runs/short", OPTIONS["Text"], curve=(0.6,))
    longer, shorter = read([tmp_path / "runs"])
    assert [longer.at_epoch(epoch) for epoch in (1, 2, 4.5, 5, 6)] == [0.1, 0.3, 0.4, 0.5, None]
    assert [point[2] for point in longer.curve] == [20, 40, 60, 80, 100]
    assert tables.epoch_rows([longer, shorter]) == [
        ["run", "metric", "epoch 1", "epoch 2", "epoch 5", "last"],
        ["long", "accuracy", "0.1000", "0.3000", "0.5000", "0.5000 (epoch 5)"],
        ["short", "accuracy", "0.6000", "–", "–", "0.6000 (epoch 1)"],
    ]
    assert (shorter.test, shorter.best_validation) == (None, 0.6)
    assert "not finished" in tables.run_rows([shorter])[1]


def test_the_command_writes_a_report(tmp_path, capsys):
    run = write_run(tmp_path / "runs/text", OPTIONS["Text"], accuracy=0.875)
    assert report.main([str(run), f"--out={tmp_path / 'report'}"]) == 0
    text = (tmp_path / "report/report.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "87.50 / 89.31" in text
    assert tables.RULE in text
    record = json.loads((tmp_path / "report/report.json").read_text())
    assert record["runs"][0]["curve"][1] == dict(epoch=2, value=0.4, training_seconds=40.0)
    assert record["long_range_arena"]["s4"]["s5"]["ours"]["Text"] == 87.5
    for name in ("curves.png", "cost.png", "speed.png"):
        assert (tmp_path / "report" / name).read_bytes()[:4] == b"\x89PNG"


def test_what_is_no_run_directory_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")  # without a log or a checkpoint
    for place, words in (
        ("empty", "is no run directory and holds none: a run directory has config.json and the log"),
        ("none", "is no folder; give run directories"),
    ):
        assert report.main([str(tmp_path / place), f"--out={tmp_path / 'report'}"]) == 2
        assert words in capsys.readouterr().err
    run = write_run(tmp_path / "run", OPTIONS["Text"])
    (run / "config.json").write_text("{")
    assert report.main([str(run), f"--out={tmp_path / 'report'}"]) == 2
    assert "config.json, line 1" in capsys.readouterr().err
    (run / "config.json").unlink()
    assert not (tmp_path / "report").exists()


TINY = [
    "--config.model.width=8",
    "--config.model.depth=1",
    "--config.model.mixers.s5.state_size=4",
    "--config.model.mixers.s5.blocks=1",
    "--config.train.batch_size=8",  # one row for each of the emulated devices
    "--config.train.epochs=2",
    "--config.train.tensorboard=false",
    "--config.task.length=16",
    "--config.data.bucket_bounds=none",
]


def official(name, folder):
    """Writes small files in the official format of a task; returns the options that they need."""
    if name == "retrieval":
        folder.mkdir()
        for split in ("train", "eval", "test"):
            lines = (f"{n % 2}.0\ta\tb\tpaper {n}\tpaper {n % 2}\n" for n in range(8))
            (folder / f"new_aan_pairs.{split}.tsv").write_text("".join(lines))
        return []
    for split in ("train", "test"):
        for label, rating in (("neg", 1), ("pos", 9)):
            (folder / split / label).mkdir(parents=True)
            for number in range(6):
                (folder / split / label / f"{number}_{rating}.txt").write_text(f"{label} film {number}")
    return ["--config.task.validation=4"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name, task", [("text", "Text (length=16, validation=4)"), ("retrieval", "Retrieval (length=16)")]
)
def test_official_files_lead_to_a_report(name, task, tmp_path, capsys):
    more = official(name, tmp_path / "files")
    command = [
        f"--config=configs/lra/{name}.py:mixer=s5",
        f"--workdir={tmp_path / 'runs' / name}",
        *TINY,
        *more,
    ]
    command += [
        f"--config.task.official_dir={tmp_path / 'files'}",
        f"--config.task.data_dir={tmp_path / 'data'}",
    ]
    assert train.main(command) == 0
    capsys.readouterr()
    assert report.main([str(tmp_path / "runs"), f"--out={tmp_path / 'report'}"]) == 0
    (row,) = [line for line in rows_of(capsys.readouterr().out) if len(line) == 16 and line[0] == name]
    assert row[1:4] == [task, "s5", "s4"]
    assert 0 <= float(row[6]) <= 1
    assert row[8].endswith("of 2")
