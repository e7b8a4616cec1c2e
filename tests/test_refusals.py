"""What is refused, how, and in which words: the tables in `tests/refusals`, run in this process.

A command ends with exit code 2 and prints no traceback; a call raises the error of its row. The words of a row stand in
the message. Every row is another mistake.
"""

import pathlib

import pytest

from experiments.__main__ import main
from tests.refusals import calls, commands, files

CONFIGS = {
    "MASKED": "configs/lm/masked.py",
    "MQAR": "configs/synthetic/mqar.py",
    "PROTEINS": "configs/protein/residues.py",
    "REGRESSION": "configs/synthetic/linear_regression.py",
    "SHORT": "configs/lra/listops_short.py",
    "MODELS": "configs/lm/models.py",
}
LEAST_ROWS = 300


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The folder of the files that commands are pointed at."""
    folder = tmp_path_factory.mktemp("files")
    files.write(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch):
    """What is not refused fails at once, before it trains or makes data."""

    def late(*_args, **_options):
        pytest.fail("nothing was refused")

    monkeypatch.setattr("experiments.training.loop.train", late)
    monkeypatch.setattr("experiments.data.listops.draw_block", late)


@pytest.mark.parametrize("row", commands.ROWS, ids=lambda row: row[0])
def test_commands(row, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pathlib.Path(__file__).resolve().parents[1])
    line, *words = row
    places = CONFIGS | {"TMP": str(tmp_path), "FILES": str(given)}
    for name, place in places.items():
        line = line.replace(name, place)
    try:
        code = main(line.split())
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr().err
    assert code == 2, said
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.name[0] != "."] == []


@pytest.mark.parametrize("row", calls.ROWS, ids=lambda row: row[2])
def test_calls(row):
    call, error, words = row
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_there_are_many_rows_and_no_two_are_alike():
    lines = [row[0] for row in commands.ROWS]
    assert len(lines) == len(set(lines))
    assert len(lines) + len(calls.ROWS) >= LEAST_ROWS
