"""Checkpoints on disk."""

import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from experiments.runs import manifests
from experiments.runs.checkpoints import CheckpointError, Checkpoints


def arrays(value=0.0):
    return {
        "step": np.array(3, np.int32),
        "parameters/stack/blocks/0/b": np.full((2, 3), value, np.float32),
        "parameters/head": np.arange(4, dtype=np.float32),
    }


def note(value=0):
    return dict(data={"next_index": value}, exact=[0.1, 1e-300, -0.0], text=None)


@pytest.mark.smoke
def test_what_is_saved_comes_back(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(5, arrays(1.5), note(7))
    with Checkpoints(tmp_path) as checkpoints:
        got, read = checkpoints.load(5)
    assert read == note(7)
    assert got.keys() == arrays().keys()
    for name, array in arrays(1.5).items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


def test_the_best_and_the_last_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.steps == []
        assert checkpoints.best is checkpoints.latest is None
        for step, score in [(1, 0.5), (2, 0.7), (3, None), (4, 0.7), (5, float("nan")), (6, 0.1)]:
            checkpoints.save(step, arrays(step), note(step), score=score)
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6]
        assert checkpoints.best == 2
        assert checkpoints.latest == 6


def test_the_best_survives_a_score_that_is_dropped(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for step, score in [(1, 0.5), (2, 0.4), (3, 0.7)]:
            checkpoints.save(step, arrays(), note(), score=score, provisional=step == 3)
        checkpoints.wait()
        assert checkpoints.from_best == [3, 1]
        checkpoints.drop_score(3)
        assert checkpoints.best == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best == 1
        assert checkpoints.intact([3]) == 3


def test_what_a_killed_process_did_not_delete_is_deleted(tmp_path):
    save(tmp_path, 1, 2, 3, scores=(0.5, 0.4, 0.3))
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert checkpoints.steps == [1, 2, 3]
        checkpoints.prune()
        assert checkpoints.steps == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_what_a_killed_process_left_unfinished_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save(1, arrays(), note())
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", unfinished)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
    assert unfinished.exists()  # a reader changes nothing
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert not unfinished.exists()
        checkpoints.save(2, arrays(2.0), note())
        checkpoints.wait()
        assert checkpoints.steps == [1, 2]


def test_missing_steps_and_writing_to_a_reader_are_refused(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(4, arrays(), note())
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"no checkpoint of step 3; there are \[4\]"):
            checkpoints.load(3)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="opened for reading"):
        checkpoints.save(5, arrays(), note())


def test_a_checkpoint_of_another_format_is_refused_by_its_version(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as orbax:
        orbax.save(3, {"arrays": {"step": np.array(3)}, "note": "{}"})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="by version 0.1.0"):
        checkpoints.load(3)


def test_a_folder_may_be_moved(tmp_path):
    with Checkpoints(tmp_path / "old", keep_last=1) as checkpoints:
        checkpoints.save(1, arrays(), note(2))
    (tmp_path / "old").rename(tmp_path / "new")
    with Checkpoints(tmp_path / "new", keep_last=1) as checkpoints:
        assert checkpoints.load(1)[1] == note(2)


def save(folder, *steps, keep_last=9, scores=()):
    with Checkpoints(folder, keep_last=keep_last) as checkpoints:
        for number, step in enumerate(steps):
            score = scores[number] if scores else None
            checkpoints.save(step, arrays(step), note(step), score=score)


def test_a_flipped_bit_in_any_file_is_seen(tmp_path, capsys):
    save(tmp_path, 1, 2, scores=(0.5, 0.7))
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    rng = np.random.default_rng(0)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.intact([2, 1]) == 2
        assert capsys.readouterr().err == ""
        for path in files:
            whole = path.read_bytes()
            for place in rng.integers(0, 8 * len(whole), 5):
                damaged = bytearray(whole)
                damaged[place // 8] ^= 1 << (place % 8)
                path.write_bytes(damaged)
                if path.name == manifests.NAME and _same_json(whole, bytes(damaged)):
                    continue
                assert checkpoints.intact([2, 1]) == 1, (path, place)
                text = capsys.readouterr().err
                assert text.startswith("The checkpoint of step 2 is damaged and left out: ")
                assert text.count("\n") == 1
            path.write_bytes(whole[:-2])
            assert checkpoints.intact([2]) is None
            path.unlink()
            assert checkpoints.intact([2]) is None
            assert f"{path.relative_to(tmp_path / '2')} is missing" in capsys.readouterr().err
            path.write_bytes(whole)
        assert checkpoints.intact([2]) == 2


def _same_json(one, other):
    """Whether a flip in the manifest changes nothing that is read, as from one kind of space to another."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_a_damaged_score_is_not_the_best(tmp_path):
    save(tmp_path, 1, 2, scores=(0.5, 0.7))
    file = tmp_path / "2" / manifests.NAME
    file.write_text(file.read_text().replace("0.7", "0.9"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.from_best == [1]
        assert checkpoints.intact([2]) is None


def test_a_checkpoint_without_a_manifest_is_taken_with_a_line(tmp_path, capsys):
    with ocp.training.Checkpointer(tmp_path) as orbax:  # as version 0.2.0 wrote them
        content = {"state": arrays(4.0), "note": json.dumps(note())}
        orbax.save(4, content, metrics={"score": 0.25}, force=True)
    save(tmp_path, 5)
    (tmp_path / "6").mkdir()
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.best == 4
        assert checkpoints.intact([6, 4]) == 4
        incomplete, unknown = capsys.readouterr().err.splitlines()
        assert incomplete == "The checkpoint of step 6 is damaged and left out: it is incomplete."
        assert unknown.startswith("The checkpoint of step 4 has no hashes.json")
        np.testing.assert_array_equal(
            checkpoints.load(4)[0]["parameters/stack/blocks/0/b"], np.full((2, 3), 4.0)
        )


def test_damaged_checkpoints_are_set_aside_and_their_steps_written_again(tmp_path):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.set_aside_after(1)
        assert checkpoints.steps == [1]
        assert (tmp_path / "2.damaged" / manifests.NAME).exists()
        checkpoints.save(2, arrays(), note())
        checkpoints.save(2, arrays(), note(7))  # a step may be written over
        checkpoints.wait()
        assert checkpoints.intact([2]) == 2
        assert checkpoints.load(2)[1] == note(7)


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifests, "write_atomically", fail)
    message = rf"the checkpoint of step 1 cannot be written to {tmp_path}: No space left on device"
    with pytest.raises(CheckpointError, match=message), Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, arrays(), note())
    assert list(tmp_path.iterdir()) == []
    with Checkpoints(tmp_path / "a", keep_last=1) as checkpoints:
        (tmp_path / "a").rmdir()
        (tmp_path / "a").touch()
        with pytest.raises(CheckpointError, match="the checkpoint of step 1 cannot be written"):
            checkpoints.save(1, arrays(), note())


def counts():
    """Numbers of threads that Python knows and of open files of this process."""
    return threading.active_count(), len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("saves", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_saves_leave_no_thread_and_no_open_file(tmp_path, saves):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for step in range(1, 4):  # Orbax keeps a few threads of its own
            checkpoints.save(step, arrays(), note())
        checkpoints.wait()
        threads, files = counts()
        for step in range(4, saves + 4):
            checkpoints.save(step, arrays(), note())
        checkpoints.wait()
        assert counts()[0] <= threads + 3
        assert counts()[1] <= files + 3
    assert counts()[1] <= files + 3
