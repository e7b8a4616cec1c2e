"""Checkpoints on disk."""

import shutil

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from experiments.runs.checkpoints import Checkpoints


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
