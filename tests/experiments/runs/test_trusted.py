"""The hashes of what a run directory is relied on for."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate
from experiments.parallel.mesh import Devices
from experiments.runs import manifests, trusted
from experiments.runs import results as run_results
from experiments.runs.checkpoints import CheckpointError, Checkpoints
from experiments.runs.directory import RunDirectory
from experiments.runs.files import DamagedFileError, write_atomically
from experiments.runs.interrupts import Stop
from experiments.runs.logs import MetricsFile
from experiments.training import experiment, loop
from tests.experiments.tiny import build_tiny_model, make_tiny_task, tiny_config

CONFIG, DATA, RESULTS, LOG = "config.json", "manifest.json", "results.json", "metrics.jsonl"
MANIFEST = {"name": "tiny", "sha": "1"}
BRIEF = {"train": dict(epochs=1, checkpoint_every=None), "data": dict(bucket_bounds=(8,))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_task", make_tiny_task)
        patch.setattr(experiment, "build_model", build_tiny_model)
        plan = experiment.build(tiny_config(**BRIEF))
        run = RunDirectory.open(folder, plan.config)
        run.begin(plan.config, plan.task.manifest, plan.groups_table)
        devices = Devices.first(1)
        outcome = loop.train(plan, run, devices=devices, stop=Stop())
        run.write_results(run_results.summarize(plan, outcome, devices))
        run.release()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << (place % 8)
    path.write_bytes(content)


def everything(folder, capsys):
    """What is read from a run, and what is said meanwhile."""
    run = RunDirectory(folder)
    try:
        read = dict(config=run.config(), data=run.data(), results=run.results(), log=run.log())
        with Checkpoints(run.checkpoints) as checkpoints:
            if checkpoints.intact(checkpoints.steps) is None:
                raise CheckpointError("damaged")
            arrays, note = checkpoints.load(checkpoints.latest)
    except (DamagedFileError, CheckpointError) as error:
        return None, f"{error}\n{capsys.readouterr().err}"
    return read | dict(note=note, **{n: a.tobytes() for n, a in arrays.items()}), capsys.readouterr().err


def test_a_flipped_bit_is_noticed_and_named_or_changes_nothing(copy, capsys):
    whole, said = everything(copy, capsys)
    assert not said
    files = [copy / name for name in (CONFIG, DATA, RESULTS, LOG, manifests.NAME)]
    files += sorted(
        path for path in (copy / "checkpoints").rglob("*") if path.is_file() and path.stat().st_size
    )
    assert len(files) > 10
    rng = np.random.default_rng(0)
    for path, _ in zip(itertools.cycle(files), range(200), strict=False):
        content = path.read_bytes()
        flip(path, place := rng.integers(8 * len(content)))
        read, said = everything(copy, capsys)
        path.write_bytes(content)
        # A checkpoint is named by its step, and the file in it by its name.
        assert path.name in said or read == whole, (path, place, said)
    assert everything(copy, capsys) == (whole, "")


def test_a_flipped_bit_in_the_log_of_a_run_that_goes_on_is_noticed(copy, capsys):
    with Checkpoints(copy / "checkpoints") as checkpoints:
        step = checkpoints.latest
        seal = checkpoints.load(step)[1]["logs"]
    path = copy / LOG
    content, rng = path.read_bytes(), np.random.default_rng(1)

    def resumed():
        MetricsFile(path, after_step=step, seal=seal).close()
        return path.read_bytes(), capsys.readouterr().err

    whole, said = resumed()
    assert not said
    for place in rng.integers(8 * len(content), size=60):
        path.write_bytes(content)
        flip(path, place)
        read, said = resumed()
        assert str(path) in said or read == whole, place


@pytest.mark.parametrize("name", [CONFIG, DATA, RESULTS])
def test_valid_json_with_another_value_is_refused_in_one_line(copy, name):
    path = copy / name
    path.write_text(path.read_text().replace("0", "3", 1))
    run = RunDirectory(copy)
    with pytest.raises(
        DamagedFileError, match=f"{name} is not what was written: .*; (restore|delete) it"
    ) as error:
        run.config(), run.data(), run.results()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [CONFIG, DATA])
def test_damage_is_not_evaluated_and_lost_hashes_are_lived_without(copy, name, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "make_task", make_tiny_task)
    monkeypatch.setattr(experiment, "build_model", build_tiny_model)
    command = [f"--workdir={copy}", "--num_devices=1"]
    path = copy / name
    path.write_text(path.read_text().replace("0", "1", 1))
    assert evaluate.main(command) == 2
    assert f"{name} is not what was written" in capsys.readouterr().err
    (copy / manifests.NAME).unlink()
    code, err = evaluate.main(command), capsys.readouterr().err
    # Another seed of the run evaluates as before; another manifest is not that of the data.
    assert (code, "other data: parameters differ" in err) == ((0, False) if name == CONFIG else (2, True))


def test_other_data_are_not_evaluated(copy, capsys, monkeypatch):
    def other(name, **options):
        return make_tiny_task(name, **options | {"data_seed": 1})

    monkeypatch.setattr(experiment, "make_task", other)
    monkeypatch.setattr(experiment, "build_model", build_tiny_model)
    assert evaluate.main([f"--workdir={copy}", "--num_devices=1"]) == 2
    assert (
        "was trained on other data: parameters differ from its manifest.json; restore"
        in capsys.readouterr().err
    )


def begin(folder, config):
    run = RunDirectory.open(folder, config, lambda run, newest: None)
    try:
        run.begin(config, MANIFEST, "table")
    finally:
        run.release()


class Killed(BaseException):
    """The end of a process, which no handler sees."""


def killed_before(monkeypatch, count, act):
    """Does something that ends before the write number `count`; returns whether it ended so."""
    left = iter(range(count))

    def write(path, text):
        if next(left, None) is None:
            raise Killed
        write_atomically(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(trusted, "write_atomically", write)
        patch.setattr(manifests, "write_atomically", write)
        try:
            act()
        except Killed:
            return True
    return False


def test_a_new_run_may_be_killed_between_a_file_and_its_hash(tmp_path, monkeypatch):
    for count in itertools.count():
        folder = tmp_path / str(count)
        killed = killed_before(monkeypatch, count, lambda folder=folder: begin(folder, tiny_config(seed=1)))
        begin(folder, tiny_config())
        assert RunDirectory(folder).config() == tiny_config()
        if not killed:
            break
    assert count >= 4


@pytest.mark.parametrize("protected", [True, False])
def test_a_run_that_is_extended_may_be_killed_between_a_file_and_its_hash(tmp_path, monkeypatch, protected):
    shorter, longer = tiny_config(), tiny_config(train=dict(epochs=9))
    seen = []
    for count in itertools.count():
        folder = tmp_path / str(count)
        begin(folder, shorter)
        (folder / "checkpoints" / "4").mkdir(parents=True)
        if not protected:
            (folder / manifests.NAME).unlink()
        killed = killed_before(monkeypatch, count, lambda folder=folder: begin(folder, longer))
        seen.append(RunDirectory(folder).config())
        assert RunDirectory(folder).data() == MANIFEST
        begin(folder, longer)
        assert RunDirectory(folder).config() == longer
        path = folder / CONFIG
        path.write_text(path.read_text().replace('"epochs": 9', '"epochs": 4'))
        with pytest.raises(DamagedFileError, match=CONFIG):  # what was allowed meanwhile is no longer
            RunDirectory(folder).config()
        if not killed:
            break
    assert seen == sorted(seen, key=lambda config: config == longer)
    assert shorter in seen
    assert longer in seen[:-1]


def test_results_may_be_killed_between_a_file_and_its_hash(tmp_path, monkeypatch):
    for count in itertools.count():
        folder = tmp_path / str(count)
        begin(folder, tiny_config())
        (folder / "checkpoints" / "4").mkdir(parents=True)
        (folder / LOG).write_text('{"kind": "train", "step": 1}\n')
        run = RunDirectory(folder)
        killed = killed_before(monkeypatch, count, lambda run=run: run.write_results({"steps": 4}))
        assert run.results() in ({"steps": 4}, None)
        begin(folder, tiny_config())
        with Path(folder / LOG).open("a") as file:
            file.write('{"kind": "train", "step": 2}\n')
        assert len(run.log()) == 2
        run.write_results({"steps": 5})
        assert run.results() == {"steps": 5}
        if not killed:
            break
    assert count == 3


def test_a_run_without_hashes_is_taken_and_gets_them(copy):
    (copy / manifests.NAME).unlink()
    config = RunDirectory(copy).config()
    begin_with = json.loads((copy / DATA).read_text())
    run = RunDirectory.open(copy, config)
    run.begin(config, begin_with, "table")
    run.release()
    flip(copy / DATA, 8 * (copy / DATA).read_bytes().index(b"tiny"))
    with pytest.raises(DamagedFileError, match=DATA):
        RunDirectory(copy).data()
