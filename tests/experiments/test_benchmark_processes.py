"""Measurements prepared in several processes: their order, that none starts before all are ready, and ends that come early."""

import os
import time

import pytest

from experiments.benchmark import processes


def prepare(key, say):
    """Takes longer for later keys, which need less memory."""
    time.sleep(0.05 * key)
    ready = time.monotonic()
    say(f"{key}: ready")
    row = {"key": key, "process": os.getpid(), "ready": ready}
    return processes.Ready(lambda: [row | {"measured": time.monotonic()}], peak_bytes=10 - key)


def end_early(key, say):
    """Ends the process for one of the keys."""
    if key == 2:
        os._exit(3)
    return processes.Ready(lambda: [{"key": key}], 0)


def end_when_measured(key, say):
    """Ends the process of one of the keys when it is to measure."""
    return processes.Ready(lambda: os._exit(3) if key == 2 else [{"key": key}], 0)


@pytest.mark.parametrize(
    "workers, count, order", [(1, 1, [0, 1, 2, 3]), (2, 2, [2, 3, 0, 1]), (8, 4, [3, 2, 1, 0])]
)
def test_everything_is_ready_before_anything_is_measured(workers, count, order):
    reported, said = [], []
    rows = processes.run(prepare, range(4), workers, reported.append, said.append)
    assert [row["key"] for row in rows] == list(range(4))
    # The process of the last keys needs the least memory.
    assert [row["key"] for row in reported] == order
    assert sorted(said) == [f"{key}: ready" for key in range(4)]
    assert len({row["process"] for row in rows}) == count
    assert (os.getpid() in {row["process"] for row in rows}) == (workers == 1)
    measured = [row["measured"] for row in reported]
    assert measured == sorted(measured)
    assert max(row["ready"] for row in rows) <= measured[0]


@pytest.mark.parametrize("prepare", [end_early, end_when_measured])
def test_a_process_that_ends_early_is_named_and_costs_nothing_of_the_others(prepare):
    reported = []
    with pytest.raises(processes.EndedEarly, match="had to measure 2, 3$"):
        processes.run(prepare, range(6), 3, reported.append, print)
    assert [row["key"] for row in reported] == [0, 1, 4, 5]
