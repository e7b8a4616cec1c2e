"""Lists of what there is, from docstrings."""

import json

import pytest

from experiments import list as listing
from experiments.tasks import TASKS
from layers.mixers import MIXERS


def test_every_mixer_says_what_it_is_and_names_its_paper():
    entries = listing.mixers()
    assert [entry.name for entry in entries] == sorted(MIXERS)
    bare = [entry.name for entry in entries if " " not in entry.description or entry.paper is None]
    assert bare == []


def test_every_config_and_task_says_what_it_is():
    assert [entry.name for entry in listing.tasks()] == sorted(TASKS)
    entries = listing.configs()
    assert "configs/lra/listops.py" in [entry.name for entry in entries]
    entries += listing.tasks()
    assert all(entry.description for entry in entries)
    assert all(line.count("\n") == 0 for entry in entries for line in entry if line)


@pytest.mark.parametrize(
    "docstrings, description, paper",
    [
        (
            ["Mix: a mixer (A et al. 2020, arXiv:2001.00001).\n\nMore."],
            "a mixer",
            "A et al. 2020, arXiv:2001.00001",
        ),
        (["A (grouped) mixer (A 2020) of x."], "A (grouped) mixer of x", "A 2020"),
        (["No paper.", None, "Mix: with one (B and C 1997, doi:1)."], "with one", "B and C 1997, doi:1"),
        (["A mixer.\n\n(See D 2019, arXiv:1901.00001.)"], "A mixer", "See D 2019, arXiv:1901.00001."),
        (["A mixer.\n\nSee (E 2020,\n  arXiv:2001.00002)."], "A mixer", "E 2020, arXiv:2001.00002"),
        (["A mixer."], "A mixer", None),
        ([None], "", None),
    ],
)
def test_docstrings_are_read(docstrings, description, paper):
    assert listing.read("mix", docstrings) == ("mix", description, paper)


def test_the_command(capsys):
    assert listing.main(["mixers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(MIXERS)
    assert listing.main(["tasks", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == set(TASKS)
    assert listing.main(["--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["mixers", "tasks", "caches", "configs"]
    assert listing.main([]) == 0
    assert "configs:\nconfigs/" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        listing.main(["mixer"])
    assert left.value.code == 2
