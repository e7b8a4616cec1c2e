"""The cache: a data set comes back as it was stored, and damage of any kind is named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from experiments.data import cache
from experiments.data.cache import CorruptCacheError, Recipe
from experiments.data.fingerprint import content_sha256
from experiments.data.sequences import Sequences

ROOT = Path(__file__).parents[3]
RECIPE = Recipe(
    "toy", 3, {"size": 5, "window": (1, 9)}, ("<pad>", "a", "b"), "python -m experiments.data.prepare toy"
)
RECORDS = {
    "train": [(b"\1\2\1", 1), (b"\2", 0), (b"\1" * 300, -7)],
    "test": [(b"\2\2", 2)],
}


def build():
    return {split: Sequences.from_records(records) for split, records in RECORDS.items()}


@pytest.fixture
def stored(tmp_path):
    return cache.load_or_build(RECIPE, build, data_dir=tmp_path)


def load(tmp_path, recipe=RECIPE):
    def refuse():
        raise AssertionError("built again")

    return cache.load_or_build(recipe, refuse, data_dir=tmp_path)


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip(stored, tmp_path):
    again = load(tmp_path)
    for dataset in (stored, again):
        found = {
            split: [(bytes(tokens), label) for tokens, label in sequences.records()]
            for split, sequences in dataset.splits.items()
        }
        assert found == RECORDS
    assert again.manifest == stored.manifest == json.loads((stored.folder / "manifest.json").read_text())
    assert stored.folder.parent == tmp_path
    assert os.listdir(tmp_path) == [stored.folder.name]


def test_manifest_says_what_is_there(stored):
    manifest = stored.manifest
    assert manifest["parameters"] == {"size": 5, "window": [1, 9]}
    assert manifest["vocabulary"] == ["<pad>", "a", "b"]
    assert manifest["splits"]["train"]["records"] == 3
    assert manifest["splits"]["train"]["tokens"] == 304
    assert manifest["splits"]["test"]["bytes"] == (stored.folder / "test.array_record").stat().st_size
    assert manifest["content_sha256"] == content_sha256(RECORDS)


def test_records_are_plain_array_records(stored):
    reader = array_record_module.ArrayRecordReader(str(stored.folder / "train.array_record"))
    assert reader.read([1, 0]) == [b"\0\0\0\0\2", b"\1\0\0\0\1\2\1"]
    assert "group_size:1" in reader.writer_options_string()
    reader.close()


def test_wide_tokens(tmp_path):
    recipe = Recipe("wide", 1, {}, (), "-", token_dtype="uint16")
    tokens = np.array([1, 300, 65_535, 7], np.uint16)
    splits = {"train": Sequences(tokens, [0, 3, 4], [0, 1])}
    found = cache.load_or_build(recipe, lambda: splits, data_dir=tmp_path).splits["train"]
    assert found.tokens.dtype == np.uint16
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_array_equal(found.lengths, [3, 1])


def test_content_hash_depends_on_everything():
    variants = [
        RECORDS,
        dict(reversed(RECORDS.items())),
        RECORDS | {"test": [(b"\2\2", 3)]},
        RECORDS | {"test": [(b"\2", 2), (b"\2", 2)]},
        RECORDS | {"extra": []},
        {"train": RECORDS["train"][::-1], "test": RECORDS["test"]},
    ]
    assert len({content_sha256(variant) for variant in variants}) == len(variants)


def test_folder_depends_on_parameters_and_version(stored, tmp_path):
    other = Recipe("toy", 3, {"size": 6, "window": (1, 9)}, RECIPE.vocabulary, "-")
    newer = Recipe("toy", 4, RECIPE.parameters, RECIPE.vocabulary, "-")
    folders = {cache.load_or_build(recipe, build, data_dir=tmp_path).folder for recipe in (other, newer)}
    assert len(folders | {stored.folder}) == 3


def test_location(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("SEQMODELS_DATA", raising=False)
    assert cache.data_root() == Path("/home/someone/.cache/seqmodels")
    monkeypatch.setenv("SEQMODELS_DATA", str(tmp_path))
    assert cache.data_root() == tmp_path
    assert cache.data_root("~/mine") == Path("/home/someone/mine")


@pytest.mark.parametrize("position", [0, 20, 65_600, -1])
def test_flipped_byte(stored, tmp_path, position):
    path = stored.folder / "train.array_record"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCacheError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert "sha256" in message
    assert f"Delete the folder {stored.folder}" in message
    assert f"`{RECIPE.rebuild} --data_dir={tmp_path}`" in message


def test_damaged_files(stored, tmp_path):
    path = stored.folder / "test.array_record"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(CorruptCacheError, match=r"test\.array_record: .*bytes"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(CorruptCacheError, match=r"test\.array_record: .*No such file"):
        load(tmp_path)
    path.write_bytes(content)
    load(tmp_path)


def test_swapped_files(stored, tmp_path):
    train, test = (stored.folder / f"{split}.array_record" for split in ("train", "test"))
    train.rename(tmp_path / "aside")
    test.rename(train)
    (tmp_path / "aside").rename(test)
    with pytest.raises(CorruptCacheError, match=r"train\.array_record"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["parameters"].update(size=6), 'parameters is {"size": 6'),
        (lambda m: m.update(version=2), "version is 2, but it should be 3"),
        (lambda m: m.update(name="other"), 'name is "other"'),
        (lambda m: m.update(format=0), "format is 0"),
        (lambda m: m["vocabulary"].reverse(), "vocabulary is"),
        (lambda m: m.update(token_dtype="int32"), "token_dtype is"),
        (lambda m: m.update(content_sha256="0"), 'content_sha256 is "0"'),
        (lambda m: m.pop("content_sha256"), "content_sha256 is null"),
        (lambda m: m["splits"].pop("test"), "content_sha256 is"),
        (lambda m: m.update(splits=dict(reversed(m["splits"].items()))), "content_sha256 is"),
        (lambda m: m.pop("splits"), "damaged .*splits"),
        (lambda m: m.update(splits=3), "damaged"),
        (lambda m: m["splits"]["train"].update(records=4), 'records": 4'),
        (lambda m: m["splits"]["train"].update(tokens=1), 'tokens": 1'),
        (lambda m: m["splits"]["train"].update(bytes=1), 'bytes": 1'),
        (lambda m: m["splits"]["train"].pop("sha256"), "sha256"),
        (lambda m: m["splits"]["train"].update(note="x"), '"note"'),
        (lambda m: m.update(note="x"), "unknown fields .*note"),
    ],
)
def test_edited_manifest(stored, tmp_path, change, message):
    edit_manifest(stored.folder, change)
    with pytest.raises(CorruptCacheError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_unreadable_manifest(stored, tmp_path, content):
    (stored.folder / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptCacheError, match=r"manifest\.json: the manifest is damaged"):
        load(tmp_path)


def test_incomplete_folder(tmp_path):
    (tmp_path / RECIPE.folder_name).mkdir()
    with pytest.raises(CorruptCacheError, match=r"manifest\.json: the manifest cannot be read .No such file"):
        load(tmp_path)


def test_two_builds_at_once(tmp_path):
    inner = []

    def slow_build():
        inner.append(cache.load_or_build(RECIPE, build, data_dir=tmp_path))
        return build()

    outer = cache.load_or_build(RECIPE, slow_build, data_dir=tmp_path)
    assert outer.manifest == inner[0].manifest
    assert os.listdir(tmp_path) == [RECIPE.folder_name]


def test_failed_build_leaves_nothing(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.load_or_build(RECIPE, fail, data_dir=tmp_path)
    assert os.listdir(tmp_path) == []


def test_killed_while_writing(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from experiments.data import cache\n"
        "from tests.experiments.data.test_cache import RECIPE, build\n"
        "cache._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.load_or_build(RECIPE, build, data_dir=sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".{RECIPE.folder_name}.")
    assert cache.load_or_build(RECIPE, build, data_dir=tmp_path).manifest["content_sha256"]
    assert left.exists()  # it may be another process at work
    long_ago = time.time() - 2 * cache.STALE_SECONDS
    os.utime(left, (long_ago, long_ago))
    other = Recipe(RECIPE.name, RECIPE.version, {"size": 1}, RECIPE.vocabulary, "-")
    cache.load_or_build(other, build, data_dir=tmp_path)
    assert left.exists()  # of another data set
    for path in (tmp_path / RECIPE.folder_name).iterdir():
        path.unlink()
    (tmp_path / RECIPE.folder_name).rmdir()
    cache.load_or_build(RECIPE, build, data_dir=tmp_path)
    assert not left.exists()


def test_summary_names_counts_and_hash(stored):
    text = cache.summary(stored)
    assert stored.manifest["content_sha256"] in text
    assert "304 tokens" in text
    assert str(stored.folder) in text


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            self.path = path

        def write(self, record):
            raise RuntimeError(f"write() failed: No space left on device; writing {self.path}; at byte 0")

    monkeypatch.setattr(cache.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(
        OSError, match=r"train.array_record cannot be written: write\(\) failed: No space left on device$"
    ):
        cache.load_or_build(RECIPE, build, data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
