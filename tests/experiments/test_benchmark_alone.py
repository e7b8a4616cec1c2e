"""Measurements in processes of their own: one that fails is a row like the others."""

import os
import time

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
