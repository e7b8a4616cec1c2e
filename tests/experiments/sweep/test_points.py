"""Sweeps of a file: its points, what is refused before any run, and runs that go on where they stopped."""

import json

import pytest

from experiments.config.command_line import ArgumentError
from experiments.sweep import __main__ as command
from experiments.sweep import points

CONFIG = "configs/lra/listops_short.py"


def write(tmp_path, body):
    file = tmp_path / "rates.py"
    file.write_text(f"def get_sweep():\n    {body}\n")
    return file


def test_dicts_and_lists_mean_the_same(tmp_path):
    file = write(
        tmp_path,
        "yield {'optimizer.learning_rate': 1e-3, 'model.scan': False, 'train.epochs': None}\n"
        "    yield ['--config.optimizer.learning_rate=0.001', 'model.scan=false', 'train.epochs=none']\n"
        "    yield {'config': 'configs/lra/image.py:mixer=s4', 'seed': 3}",
    )
    first, second, third = points.read(file, CONFIG)
    assert first.overrides == second.overrides
    assert first.overrides == (
        ("optimizer.learning_rate", "0.001"),
        ("model.scan", "false"),
        ("train.epochs", "none"),
    )
    assert first.plain_config()["optimizer"]["learning_rate"] == 1e-3
    assert first.name == "000-learning_rate=0.001,scan=false,epochs=none"
    assert (third.config, third.overrides) == ("configs/lra/image.py:mixer=s4", (("seed", "3"),))
    assert third.plain_config()["seed"] == 3
    assert first.flags(tmp_path)[0] == f"--config={CONFIG}"


@pytest.mark.parametrize(
    "body, message",
    [
        ("return []", "get_sweep gives no run"),
        ("return [3]", "item 0 of get_sweep is 3; expected a dict of values by field, or a list"),
        ("return [{}, 'seed=1']", "item 1 of get_sweep is 'seed=1'"),
        ("return [['seed']]", "item 0 of get_sweep has 'seed'; expected FIELD=VALUE"),
        ("return None", "get_sweep gives None; expected one item for each run, in a list"),
        ("return {'seed': [1, 2]}", r"get_sweep gives {'seed': \[1, 2\]}; expected one item for each run"),
        ("return 'seed=1'", "get_sweep gives 'seed=1'; expected one item for each run"),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, body, message):
    with pytest.raises(ArgumentError, match=message):
        points.read(write(tmp_path, body), CONFIG)


def test_files_without_get_sweep_and_points_without_config_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="there is no such file"):
        points.read(tmp_path / "none.py", CONFIG)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ArgumentError, match="defines no get_sweep"):
        points.read(tmp_path / "empty.py", CONFIG)
    with pytest.raises(ArgumentError, match="item 0 of get_sweep names no config; give --config"):
        points.read(write(tmp_path, "return [{'seed': 1}]"), None)


def test_an_index_is_a_number_or_that_of_the_slurm_array(tmp_path, monkeypatch):
    found = points.read(write(tmp_path, "return [{'seed': n} for n in range(3)]"), CONFIG)
    assert points.chosen(found, None) == found
    assert points.chosen(found, "1") == [found[1]]
    monkeypatch.setenv(points.ARRAY_TASK, "2")
    assert points.chosen(found, "slurm") == [found[2]]
    monkeypatch.setenv(points.ARRAY_TASK, "3")
    with pytest.raises(
        ArgumentError, match=r"--index=slurm \(SLURM_ARRAY_TASK_ID=3\); expected a number from 0 to 2"
    ):
        points.chosen(found, "slurm")
    monkeypatch.delenv(points.ARRAY_TASK)
    with pytest.raises(ArgumentError, match="SLURM_ARRAY_TASK_ID is not set"):
        points.chosen(found, "slurm")
    with pytest.raises(ArgumentError, match="--index=-1; expected a number"):
        points.chosen(found, "-1")


class Training(points.Trainings):
    """Stands for `experiments.train`: writes what it leaves behind, and fails or is interrupted as it is told."""

    def __init__(self, codes=(), signal_at=None):
        super().__init__()
        self.codes, self.calls, self.most, self.signal_at = dict(codes), [], 0, signal_at

    def start(self, key, arguments, environment=None, log=None):
        self.calls.append((key, environment, log))
        self._running[key] = arguments
        self.most = max(self.most, len(self))

    def ended(self):
        number, flags = next(iter(self._running.items()))
        del self._running[number]
        if number == self.signal_at:
            self._pass_on(15, None)
        return number, self.codes.pop(number, 0) or self.finish(number, *flags)

    def finish(self, number, config, *flags):
        (folder,) = [flag.removeprefix("--workdir=") for flag in flags if flag.startswith("--workdir=")]
        assert int(folder.rpartition("/")[2][:3]) == number
        plain = points.load(
            config.removeprefix("--config="),
            [
                tuple(flag.removeprefix("--config.").split("="))
                for flag in flags
                if flag.startswith("--config.")
            ],
        )
        directory = points.RunDirectory.open(folder, plain)
        directory.begin(plain, {}, "")
        directory.write_results(
            dict(
                selection=["accuracy", "max"],
                validation=dict(accuracy=0.5 + number / 10),
                test=dict(accuracy=0.25),
                best_step=4,
                parameters=10,
                devices="1 x cpu",
                **dict.fromkeys(("training_seconds", "eval_seconds", "compile_seconds"), 2.0),
            )
        )
        directory.release()
        return 0


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Runs the command on three points; returns its exit code and what stood for the trainings."""
    file = write(tmp_path, "return [{'seed': n} for n in range(3)]")

    def run(*more, **options):
        training = Training(**options)
        monkeypatch.setattr(points, "Trainings", lambda: training)
        code = command.main([f"--file={file}", f"--config={CONFIG}", f"--out={tmp_path / 'out'}", *more])
        return code, training

    return run


@pytest.fixture
def sweep(trainings):
    """Runs the command on three points; returns its exit code and the numbers of the runs that it trained."""

    def run(*more, **options):
        code, training = trainings(*more, **options)
        return code, [number for number, *_ in training.calls]

    return run


def test_runs_share_devices(trainings, tmp_path, capsys):
    code, training = trainings("--devices", "0", "2,3", codes={1: 65})
    assert (code, training.most) == (1, 2)
    assert f"001-seed=1 failed with exit code 65; see {tmp_path / 'out/001.log'}" in capsys.readouterr().err
    # The first device is free first, and then takes the third run.
    first, second = ({"CUDA_VISIBLE_DEVICES": value} for value in ("0", "2,3"))
    logs = [tmp_path / f"out/00{number}.log" for number in range(3)]
    assert training.calls == [(0, first, logs[0]), (1, second, logs[1]), (2, first, logs[2])]
    code, training = trainings("--devices", "5", "5")
    half = {"CUDA_VISIBLE_DEVICES": "5", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert (code, training.calls) == (0, [(1, half, logs[1])])


def test_an_interrupted_run_starts_no_other(trainings):
    code, training = trainings("--devices", "0", "1", codes={0: 75})
    assert (code, len(training), [number for number, *_ in training.calls]) == (75, 0, [0, 1])


def test_a_signal_starts_no_other_run(sweep):
    assert sweep(signal_at=0) == (75, [0])
    assert sweep() == (0, [1, 2])


def test_devices_are_refused(sweep, capsys):
    assert sweep("--devices", "0", "1;2") == (2, [])
    assert "--devices has '1;2'; expected numbers of GPUs, such as 0 1 or 0,1 2,3" in capsys.readouterr().err
    assert command.main(["--study=mqar", "--out=nowhere", "--devices", "0"]) == 2
    assert "--devices has no effect here; it goes with --file" in capsys.readouterr().err


def test_a_sweep_goes_on_where_it_stopped(sweep, tmp_path, capsys):
    assert sweep(codes={1: 75}) == (75, [0, 1])
    assert sweep(codes={1: 65}) == (1, [1, 2])
    assert "001-seed=1 failed with exit code 65" in capsys.readouterr().err
    assert "| 1 | 1 | not finished |" in (tmp_path / "out/table.md").read_text()
    assert sweep() == (0, [1])
    assert sweep() == (0, [])
    assert "3 of 3 runs are finished" in capsys.readouterr().out
    table = (tmp_path / "out/table.md").read_text()
    assert "| 2 | 2 | 0.7000 | 0.2500 | 4 | 6 |" in table
    assert "Best validation accuracy: run 2, 0.7000." in table
    records = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [record["finished"] for record in records] == [True] * 3


def test_a_damaged_run_is_named_and_the_others_go_on(sweep, tmp_path, capsys):
    assert sweep(codes={2: 65}) == (1, [0, 1, 2])
    (damaged,) = (tmp_path / "out").glob("000-*")
    (damaged / "results.json").write_text('{"selection": [')
    capsys.readouterr()
    assert sweep() == (1, [2])
    said = capsys.readouterr()
    assert "run 0 (000-seed=0): " in said.err
    assert "results.json, line 1: " in said.err
    assert "1 of 3 runs are finished" in said.out
    table = (tmp_path / "out/table.md").read_text()
    assert "| 0 | 0 | not finished |" in table
    assert "| 2 | 2 | 0.7000 |" in table


def test_one_point_and_a_time_limit(sweep):
    assert sweep("--index=2") == (0, [2])
    assert sweep("--stop_after_seconds=0.000001") == (75, [])


def test_everything_wrong_is_refused_before_any_run(sweep, tmp_path, capsys):
    assert sweep("--index=7") == (2, [])
    assert sweep("--steps=3") == (2, [])
    assert "--steps has no effect here; it goes with --study" in capsys.readouterr().err
    assert command.main(["--study=mqar", f"--out={tmp_path / 'out'}", "--index=1"]) == 2
    assert "--index has no effect here; it goes with --file" in capsys.readouterr().err
    write(tmp_path, "return [{'seed': 1}, {'model.widht': 3}]")
    assert sweep() == (2, [])
    assert "run 1 (001-widht=3): config.model has no field 'widht'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_are_those_of_experiments_train(tmp_path, capfd):
    file = write(tmp_path, "return [{'seed': 1}, {'seed': 2, 'train.steps': 3}]")
    (tmp_path / "tiny.py").write_text(
        "import runpy\nget = runpy.run_path('configs/lra/listops_short.py')['get_config']\n"
        "def get_config(arg='mixer=s5'):\n"
        "    config = get(arg)\n"
        "    config.task.update(train=16, validation=8, test=8)\n"
        f"    config.task.data_dir = {str(tmp_path / 'data')!r}\n"
        "    config.model.update(width=8, depth=1)\n"
        "    config.train.update(batch_size=8, steps=2, tensorboard=False)\n"
        "    config.optimizer.warmup_steps = 1\n"
        "    return config\n"
    )
    options = [f"--file={file}", f"--config={tmp_path / 'tiny.py'}", f"--out={tmp_path / 'out'}"]
    assert command.main([*options, "--devices", "0", "0"]) == 0
    assert "722 parameters" in (tmp_path / "out/000.log").read_text()
    assert "Best validation accuracy" in (tmp_path / "out/table.md").read_text()
    assert command.main(options) == 0
    assert "2 of 2 runs are finished" in capfd.readouterr().out
