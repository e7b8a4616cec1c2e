"""Measurements prepared in several processes: their order, that none starts before all are ready, and ends that come early."""

import os
import time

import pytest

from experiments.benchmark import processes


def prepare(key, say):
    """Takes longer for later keys."""
    time.sleep(0.05 * key)
    ready = time.monotonic()
    say(f"{key}: ready")
    return lambda: [{"key": key, "process": os.getpid(), "ready": ready, "measured": time.monotonic()}]


def end_early(key, say):
    """Ends the process for one of the keys."""
    if key == 2:
        os._exit(3)
    return lambda: [{"key": key}]


def end_when_measured(key, say):
    """Ends the process of one of the keys when it is to measure."""
    return lambda: os._exit(3) if key == 2 else [{"key": key}]


@pytest.mark.parametrize("workers, count", [(1, 1), (2, 2), (8, 4)])
def test_everything_is_ready_before_anything_is_measured(workers, count):
    reported, said = [], []
    rows = processes.run(prepare, range(4), workers, reported.append, said.append)
    assert [row["key"] for row in rows] == list(range(4))
    assert rows == reported
    assert sorted(said) == [f"{key}: ready" for key in range(4)]
    assert len({row["process"] for row in rows}) == count
    assert (os.getpid() in {row["process"] for row in rows}) == (workers == 1)
    measured = [row["measured"] for row in rows]
    assert measured == sorted(measured)
    assert max(row["ready"] for row in rows) <= measured[0]


@pytest.mark.parametrize("prepare", [end_early, end_when_measured])
def test_a_process_that_ends_early_is_named_and_costs_nothing_of_the_others(prepare):
    reported = []
    with pytest.raises(processes.EndedEarly, match="had to measure 2, 3$"):
        processes.run(prepare, range(6), 3, reported.append, print)
    assert [row["key"] for row in reported] == [0, 1, 4, 5]
