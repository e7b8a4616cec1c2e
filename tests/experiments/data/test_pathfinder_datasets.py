"""Pathfinder data sets: the cache, official files made by hand, and what is wrong with others."""

import numpy as np
import pytest
from PIL import Image

from experiments.data import pathfinder, pathfinder_datasets
from experiments.data.pathfinder import PathfinderConfig
from experiments.tasks import make_task


@pytest.fixture
def official(tmp_path):
    """A folder with two metadata files of six rows each and one empty image."""
    folder = tmp_path / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for part in (2, 10):
        (folder / f"imgs/{part}").mkdir(parents=True)
        rows = []
        for number in range(6):
            name = f"sample_{number}.png"
            Image.fromarray(np.full((4, 4), part + number, np.uint8)).save(folder / f"imgs/{part}" / name)
            rows.append(f"imgs/{part} {name} {number} {number % 2} 1.0 14 4 2 0.5 1 1")
        (folder / f"metadata/{part}.npy").write_text("\n".join(rows) + "\n")
    (folder / "imgs/2/sample_3.png").write_bytes(b"")
    return folder


def test_official_files_are_read_in_the_order_of_their_numbers(official, tmp_path):
    splits = pathfinder_datasets.load_official(official, size=4, data_dir=tmp_path / "data").splits
    values = [2, 3, 4, 6, 7, 10, 11, 12, 13, 14, 15]
    assert [len(splits[split]) for split in pathfinder.SPLITS] == [8, 1, 2]
    assert np.concatenate([s.tokens[::16] for s in splits.values()]).tolist() == values
    assert np.concatenate([s.labels for s in splits.values()]).tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1]


def damage(official, how):
    metadata, image = official / "metadata/10.npy", official / "imgs/10/sample_1.png"
    rows = metadata.read_text().splitlines()
    if how == "label":
        rows[1] = rows[1].replace("1 1 1.0", "1 7 1.0")
    elif how == "short":
        rows[1] = "imgs/10 sample_1.png"
    elif how == "missing":
        image.unlink()
    elif how == "garbage":
        image.write_bytes(b"no image")
    elif how == "size":
        Image.fromarray(np.zeros((5, 4), np.uint8)).save(image)
    metadata.write_text("\n".join(rows))


@pytest.mark.parametrize(
    "how, message",
    [
        ("label", "with label 0 or 1"),
        ("short", "expected 'folder file index label"),
        ("missing", "imgs/10/sample_1.png does not exist"),
        ("garbage", "no image that can be read"),
        ("size", "4 x 5 pixels of mode L, but size=4 needs 4 x 4"),
    ],
)
def test_a_malformed_row_is_named(official, tmp_path, how, message):
    damage(official, how)
    with pytest.raises(ValueError, match=message) as refusal:
        pathfinder_datasets.load_official(official, size=4, data_dir=tmp_path / "data")
    assert "10.npy:2: " in str(refusal.value)


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no metadata"):
        pathfinder_datasets.load_official(tmp_path, size=32, data_dir=tmp_path)


def test_the_task(tmp_path):
    options = dict(train=5, validation=3, test=2, seed=1, data_dir=tmp_path)
    task = make_task("pathfinder", **options)
    assert (task.input_size, task.vocab_size, task.num_classes) == (1, None, 2)
    assert {split: len(source) for split, source in task.splits.items()} == dict(
        train=5, validation=3, test=2
    )
    batch = task.splits["train"].gather(np.array([4, 0]), 1024)
    assert batch["inputs"].shape == (2, 1024, 1)
    assert batch["inputs"].dtype == np.float32
    images, labels = pathfinder.generate(PathfinderConfig(32, 5, 3, 2, 1), workers=1)
    np.testing.assert_allclose(batch["inputs"][0, :, 0], images[4].ravel() / 255 * 2 - 1, atol=1e-6)
    assert batch["labels"].tolist() == labels[[4, 0]].tolist()
    tokens = make_task("pathfinder", inputs="tokens", **options)
    assert (tokens.input_size, tokens.vocab_size) == (None, 256)
    np.testing.assert_array_equal(
        tokens.splits["test"].gather(np.array([1]), 1024)["inputs"][0], images[9].ravel()
    )
    assert pathfinder_datasets.sheet(images, 4).size == (131, 98)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(inputs="pixels"), "task.inputs='pixels' is unknown; choose 'values' or 'tokens'"),
        (dict(size=31), "size=31 has no parameters"),
        (dict(official_dir="x", train=3, workers=2), "train, workers would have no effect"),
        (dict(workers=0), "workers"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("pathfinder", **options)
