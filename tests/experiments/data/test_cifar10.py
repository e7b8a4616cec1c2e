"""CIFAR-10 from binary files made by hand."""

import numpy as np
import pytest
from PIL import Image

from experiments.data import cifar10
from experiments.tasks import make_task


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name in (*cifar10.TRAIN_FILES, cifar10.TEST_FILE):
        content = np.zeros((cifar10.ROWS, cifar10.ROW_BYTES), np.uint8)
        content[:, 0] = np.arange(cifar10.ROWS) % 10
        content[:3, 1:] = draws.integers(0, 256, (3, 3072))
        content.tofile(folder / name)
    return folder


def test_grey_is_that_of_pillow_and_colours_stand_side_by_side(official):
    path = official / "data_batch_1.bin"
    rows = (
        np.fromfile(path, np.uint8)
        .reshape(cifar10.ROWS, -1)[:3, 1:]
        .reshape(3, 3, 32, 32)
        .transpose(0, 2, 3, 1)
    )
    grey, labels = cifar10.read(path, colour=False)
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    for row, image in zip(grey, rows, strict=False):
        np.testing.assert_array_equal(row.reshape(32, 32), np.asarray(Image.fromarray(image).convert("L")))
    np.testing.assert_array_equal(cifar10.read(path, colour=True)[0][:3].reshape(rows.shape), rows)


def test_splits_of_the_task(official, tmp_path):
    task = make_task("cifar10", official_dir=official, data_dir=tmp_path)
    assert {name: len(split) for name, split in task.splits.items()} == dict(
        train=45000, validation=5000, test=10000
    )
    batch = task.splits["test"].gather(np.array([0, 5]), 1024)
    grey = cifar10.read(official / cifar10.TEST_FILE, colour=False)[0]
    np.testing.assert_allclose(batch["inputs"][0, :, 0], (grey[0].astype(float) - 122.6) / 61, atol=1e-5)
    assert batch["labels"].tolist() == [0, 5]
    assert "segment_ids" not in batch
    # Together the two splits are the training set, whatever the seed.
    labels = np.concatenate([task.splits[name].stored.labels for name in ("train", "validation")])
    assert np.bincount(labels).tolist() == [5000] * 10
    assert np.bincount(task.splits["validation"].stored.labels).tolist() != [500] * 10


def test_malformed_files_are_named_with_their_row(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    np.zeros(2 * cifar10.ROW_BYTES + 7, np.uint8).tofile(path)
    with pytest.raises(ValueError, match=r"data_batch_1.bin: row 3 has 7 bytes; expected 10000 rows of 3073"):
        cifar10.read(path, colour=False)
    content = np.zeros((cifar10.ROWS, cifar10.ROW_BYTES), np.uint8)
    content[41, 0] = 10
    content.tofile(path)
    with pytest.raises(ValueError, match="row 42 has the label 10; expected 0 to 9"):
        cifar10.read(path, colour=False)
    with pytest.raises(FileNotFoundError, match="lacks data_batch_2.bin, .*test_batch.bin"):
        make_task("cifar10", official_dir=tmp_path, data_dir=tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "task.official_dir is not given"),
        (
            dict(official_dir="x", inputs="gray"),
            "task.inputs='gray' is unknown; choose from grey, tokens, colour",
        ),
        (dict(official_dir="x", seed=-1), "task.seed"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("cifar10", **options)
