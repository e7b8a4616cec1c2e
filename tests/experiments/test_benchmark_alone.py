"""Measurements in processes of their own: one that fails is a row like the others."""

import itertools
import os
import time
from pathlib import Path

import pytest

from experiments.benchmark import alone


def measure(name):
    """Fails in the way that the name says."""
    if name == "ends":
        os._exit(3)
    if name == "waits":
        time.sleep(60)
    if name == "memory":
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore")
    if name == "fails":
        raise ValueError("no")
    return {"process": os.getpid()}


def test_what_fails_in_its_own_process_is_a_row():
    reported = []
    rows = alone.run(measure, ("first", "ends", "memory", "fails", "last"), 60, reported.append)
    assert rows == reported
    assert [row["case"] for row in rows] == ["first", "ends", "memory", "fails", "last"]
    assert len({rows[0]["process"], rows[4]["process"], os.getpid()}) == 3
    assert rows[1]["failed"] == "the process ended with exit code 3"
    assert rows[2] == {
        "case": "memory",
        "out_of_memory": "ValueError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes",
    }
    assert rows[3]["failed"] == "ValueError: no"
    (row,) = alone.run(measure, ("waits",), 2, reported.append)
    assert row["failed"] == "no result within 2 s"


def in_turn(name):
    """Returns when this process had its turn, which it has only once all have begun."""
    begun = Path(os.environ["BEGUN"])
    (begun / name).touch()
    while len(list(begun.iterdir())) < 3:
        time.sleep(0.01)
    with alone.turn():
        start = time.time()
        time.sleep(0.05)
        return {"start": start, "end": time.time()}


def test_workers_prepare_together_and_measure_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("BEGUN", str(tmp_path))
    rows = alone.run(in_turn, ("first", "second", "third"), 60, lambda row: None, workers=3)
    assert [row["case"] for row in rows] == ["first", "second", "third"]
    turns = sorted((row["start"], row["end"]) for row in rows)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(turns))


def in_bad_turn(name):
    """Ends or stays in its turn, as the name says; the others ask for theirs meanwhile."""
    begun = Path(os.environ["BEGUN"])
    (begun / name).touch()
    if name in ("second", "third"):
        while not (begun / "taken").exists():
            time.sleep(0.01)
    with alone.turn():
        (begun / "taken").touch()
        if name == "ends":
            os._exit(3)
        time.sleep(60 if name == "stays" else 1.0)
    return {}


@pytest.mark.parametrize(
    "bad, said", [("ends", "the process ended with exit code 3"), ("stays", "no result within 1.5 s")]
)
def test_a_turn_that_does_not_end_costs_nothing_of_the_others(tmp_path, monkeypatch, bad, said):
    """The third waits for longer than a measurement may take."""
    monkeypatch.setenv("BEGUN", str(tmp_path))
    reported = []
    rows = alone.run(in_bad_turn, (bad, "second", "third"), 1.5, reported.append, workers=3)
    assert reported == rows == [dict(case=bad, failed=said), dict(case="second"), dict(case="third")]
