"""Excerpts of installed packages: equally many of each, of other files in other splits, and pairs of different files."""

import importlib.util
import types

import numpy as np
import pytest

from experiments.data import packages, prepare
from experiments.tasks import make_task

NAMES = ("one", "two", "three")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Three packages of twelve files and a test each; file N of a package repeats its name and N."""
    places = {}
    for name in NAMES:
        root = tmp_path / "site" / name
        (root / "tests").mkdir(parents=True)
        (root / "tests/test_all.py").write_text("never read")
        for number in range(12):
            (root / f"part{number}.py").write_text(f"{name}{number:02} " * 20)
        places[name] = types.SimpleNamespace(submodule_search_locations=[str(root)])
    monkeypatch.setattr(importlib.util, "find_spec", places.get)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(packages, "PACKAGES", NAMES)
    monkeypatch.setattr(packages, "LEAST", 8)
    monkeypatch.setattr(packages, "SHARES", dict(train=0.5, validation=0.25, test=0.25))
    monkeypatch.setattr(packages, "PER_PACKAGE", dict(train=10, validation=4, test=4))
    return places


def words(ids):
    return set((np.array(ids) - 1).astype(np.uint8).tobytes().decode().split())


def whole(found):
    """The words of an excerpt that are not cut at its ends."""
    return {word for word in found if word[-2:].isdecimal() and word[:-2] in NAMES}


def test_excerpts_are_divided_by_file(installed, tmp_path):
    task = make_task("package_text", length=30, data_dir=tmp_path / "data")
    task.num_classes = len(NAMES)
    files = {}
    for split, source in task.splits.items():
        assert np.bincount(source.labels).tolist() == [packages.PER_PACKAGE[split]] * 3
        found = set()
        for index in range(len(source)):
            ids, label = source[index]
            assert len(ids) <= 30
            named = whole(words(ids))
            assert {word[:-2] for word in named} == {NAMES[label]}
            found |= named
        files[split] = found
    assert not files["train"] & (files["validation"] | files["test"])
    assert not files["validation"] & files["test"]
    assert task.baselines("test")["byte_counts"] > 0.9  # the names alone tell the package


def test_pairs_are_of_different_files_and_half_of_them_of_one_package(installed, tmp_path):
    task = make_task("package_pairs", length=30, data_dir=tmp_path / "data")
    for split, source in task.splits.items():
        assert len(source) == 2 * 3 * packages.PER_PACKAGE[split]
        batch = source.gather(np.arange(len(source)), 30)
        assert batch["labels"].mean() == 0.5
        for pair, real, label in zip(
            *(batch[name] for name in ("inputs", "segment_ids", "labels")), strict=True
        ):
            first, second = (whole(words(ids[mask > 0])) for ids, mask in zip(pair, real, strict=True))
            assert first
            assert second
            assert not first & second
            same = {word[:-2] for word in first} == {word[:-2] for word in second}
            assert same == bool(label)
    other = make_task("package_pairs", length=30, seed=1, data_dir=tmp_path / "data")
    assert other.splits["test"].stored.tokens.tolist() != task.splits["test"].stored.tokens.tolist()


def test_what_is_missing_is_named(installed, tmp_path):
    with pytest.raises(ValueError, match="the package one has 6 pieces of 160 bytes in the split 'train'"):
        make_task("package_text", length=160, data_dir=tmp_path)
    with pytest.raises(ValueError, match="task.length=1"):
        make_task("package_pairs", length=1)
    installed["two"] = None
    with pytest.raises(ValueError, match="the package two is not installed.*pip install two"):
        make_task("package_text", length=30, data_dir=tmp_path)


def test_installed_packages_suffice(tmp_path, capsys):
    assert prepare.main(["package_text", f"--data_dir={tmp_path}"]) == 0
    assert "4800 sequences" in capsys.readouterr().out
    assert prepare.main(["package_pairs", "--seed=-1"]) == 2
    assert "--seed=-1: expected at least 0" in capsys.readouterr().err
