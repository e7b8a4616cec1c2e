"""Chorales: frames and events of small files in the official layout, the stand-in of music21, losses by hand, and malformed files."""

import itertools
import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from experiments.data import chorales
from experiments.data.chorales import NEXT, NOTES
from experiments.tasks import make_task

LENGTHS = {"traindata": (5, 3), "validdata": (4,), "testdata": (2, 6)}


def cells(rolls):
    array = np.empty((1, len(rolls)), object)
    array[0] = [*rolls, None][:-1]
    return array


@pytest.fixture
def rolls():
    rng = np.random.default_rng(0)
    return {
        name: [(rng.random((t, NOTES)) < 0.05).astype(np.uint8) for t in lengths]
        for name, lengths in LENGTHS.items()
    }


@pytest.fixture
def file(tmp_path, rolls):
    path = tmp_path / "JSB_Chorales.mat"
    scipy.io.savemat(path, {name: cells(pieces) for name, pieces in rolls.items()})
    return path


def test_frames_are_asked_for_from_those_before(file, rolls, tmp_path):
    task = make_task("chorales", official_file=file, data_dir=tmp_path / "data")
    assert {split: len(source) for split, source in task.splits.items()} == dict(
        train=2, validation=1, test=2
    )
    batch = task.splits["train"].gather(np.array([1, 0]), 5)
    short, long = rolls["traindata"][1], rolls["traindata"][0]
    np.testing.assert_array_equal(batch["inputs"][0, :2], short[:2])
    np.testing.assert_array_equal(batch["labels"][0, :2], short[1:])
    assert np.isnan(batch["labels"][0, 2:]).all()
    np.testing.assert_array_equal(batch["labels"][1, :4], long[1:])
    assert batch["segment_ids"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    outputs = np.random.default_rng(1).standard_normal((2, 5, NOTES))
    outputs[0, 2:] = np.nan
    loss, sums = task.loss(jnp.asarray(outputs), {**batch, "weight": jnp.array([1.0, 0.0])})
    p = 1 / (1 + np.exp(-outputs[0, :2]))
    frames = -np.log(np.where(short[1:] > 0, p, 1 - p)).sum(1)
    np.testing.assert_allclose(float(loss), frames.mean(), rtol=1e-5)
    assert float(sums["count"]) == 2


def test_baselines_are_frequencies_of_training(file, rolls, tmp_path):
    task = make_task("chorales", official_file=file, data_dir=tmp_path / "data")
    counts, moves, frames = np.zeros(NOTES), np.zeros((2, 2, NOTES)), 0
    for roll in rolls["traindata"]:
        for before, after in itertools.pairwise(roll):
            frames += 1
            counts += after
            for note in range(NOTES):
                moves[before[note], after[note], note] += 1
    losses = {"frequencies": [], "transitions": []}
    for roll in rolls["testdata"]:
        for before, after in itertools.pairwise(roll):
            total = dict.fromkeys(losses, 0.0)
            for note in range(NOTES):
                often = (counts[note] + 1) / (frames + 2)
                seen = moves[before[note], :, note]
                after_it = (seen[1] + 1) / (seen.sum() + 2)
                for name, chance in (("frequencies", often), ("transitions", after_it)):
                    total[name] -= np.log(chance if after[note] else 1 - chance)
            for name, value in total.items():
                losses[name].append(value)
    found = task.baselines("test")
    assert found == {name: pytest.approx(np.mean(values)) for name, values in losses.items()}


def test_events_are_the_notes_of_each_frame_and_its_end(file, rolls, tmp_path):
    task = make_task("chorale_events", official_file=file, data_dir=tmp_path / "data")
    expected = []
    for frame in rolls["testdata"][0]:
        expected += [*np.nonzero(frame)[0].tolist(), NEXT]
    batch = task.splits["test"].gather(np.array([0]), len(expected) + 2)
    assert batch["inputs"][0].tolist() == [*expected[:-1], 0, 0, 0]
    assert batch["labels"][0].tolist() == [*expected[1:], -1, -1, -1]
    assert batch["segment_ids"][0].tolist() == [1] * (len(expected) - 1) + [0] * 3
    labels = np.concatenate(
        [
            [event for frame in roll for event in (*np.nonzero(frame)[0], NEXT)][1:]
            for roll in rolls["testdata"]
        ]
    )
    train = np.bincount(
        np.concatenate(
            [
                [event for frame in roll for event in (*np.nonzero(frame)[0], NEXT)][1:]
                for roll in rolls["traindata"]
            ]
        ),
        minlength=NOTES + 1,
    )
    often = (train + 1) / (train + 1).sum()
    assert task.baselines("test") == {"unigram": pytest.approx(-np.log(often[labels]).mean())}


def test_frames_come_back_from_events(rolls):
    for roll in rolls["traindata"]:
        np.testing.assert_array_equal(chorales.rolls_of(chorales.events_of(roll)), roll)


def test_a_note_sounds_in_the_quarters_that_begin_within_it():
    """A note of half a quarter that begins between two of them sounds in none; one that reaches into the next sounds there."""
    roll = chorales.roll_of([(0.0, 2.0, 60), (0.5, 0.5, 72), (0.5, 1.0, 64), (2.0, 1.0, 21), (2.0, 1.0, 108)])
    assert [np.nonzero(frame)[0].tolist() for frame in roll] == [[39], [39, 43], [0, 87]]


def test_chorales_of_music21_are_split_by_name(monkeypatch, tmp_path):
    """The package is played by a stand-in that has the members which are read of it."""

    def note(offset, length, *pitches):
        pitches = [types.SimpleNamespace(midi=pitch) for pitch in pitches]
        return types.SimpleNamespace(offset=offset, quarterLength=length, pitches=pitches)

    def parse(name):
        notes = [note(0.0, 1.0, 60 + len(name)), note(1.0, 2.0, 60, 64)]
        return types.SimpleNamespace(flatten=lambda: types.SimpleNamespace(notes=notes))

    names = [f"bach/bwv{number}" for number in range(100)]
    listed = types.SimpleNamespace(Iterator=lambda returnType: [*names, names[0]])
    package = types.ModuleType("music21")
    package.corpus = types.SimpleNamespace(chorales=listed, parse=parse)
    monkeypatch.setitem(sys.modules, "music21", package)
    monkeypatch.setattr(chorales.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(chorales.importlib.metadata, "version", lambda name: "9.9.9")
    found = chorales.load(data_dir=tmp_path)
    sizes = {split: len(stored) for split, stored in found.splits.items()}
    assert sum(sizes.values()) == 100
    assert 50 <= sizes["train"] <= 70
    assert min(sizes["validation"], sizes["test"]) >= 10
    events = found.splits["test"][0][0].tolist()
    assert events[1:] == [NEXT, 39, 43, NEXT, 39, 43, NEXT]
    assert found.manifest["parameters"] == {"music21": "9.9.9"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: found.pop("validdata"), "lacks validdata"),
        (lambda found: found["testdata"].__setitem__((0, 1), np.zeros((1, NOTES))), "piece 2 of testdata"),
        (lambda found: found["traindata"].__setitem__((0, 0), np.zeros((4, 87))), r"shape \(4, 87\)"),
        (lambda found: found["traindata"].__setitem__((0, 1), np.full((4, NOTES), 2)), "zeros and ones"),
        (lambda found: found.update(testdata=cells([])), "testdata has no piece"),
    ],
    ids=["split", "one frame", "notes", "values", "empty"],
)
def test_malformed_files_are_refused(tmp_path, rolls, change, message):
    path, found = tmp_path / "rolls.mat", {name: cells(pieces) for name, pieces in rolls.items()}
    change(found)
    scipy.io.savemat(path, found)
    with pytest.raises(ValueError, match=message):
        make_task("chorales", official_file=path, data_dir=tmp_path / "data")


def test_other_files_and_no_package_are_refused(tmp_path, file, monkeypatch):
    path, damaged = tmp_path / "notes.txt", bytearray(file.read_bytes())
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    # The reader does not know a class of 0, where the first array has its own, and fails at a name that has no value.
    unknown = bytearray(file.read_bytes())
    unknown[144] = 0
    for content in (b"C E G", b"C E G" * 100, bytes(damaged), bytes(unknown)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a file of MATLAB|lacks traindata"):
            make_task("chorales", official_file=path, data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match=r"task.official_file=.* is no file"):
        make_task("chorale_events", official_file=pathlib.Path("missing.mat"))
    monkeypatch.setattr(chorales.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install the extra music"):
        make_task("chorales")
