"""CIFAR-10 from its official binary files, cached, in grey or colour, with a validation split held out of the training set."""

import hashlib
import os
import shlex
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.held_out import hold_out
from experiments.data.sequences import Sequences

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
ROWS, SIDE, CLASSES = 10_000, 32, 10  # images per file
ROW_BYTES = 1 + 3 * SIDE * SIDE
VERSION = 1
# ITU-R 601-2 luma as the published pipelines compute it, in units of 2^-16.
LUMA = (19595, 38470, 7471)


def load(
    official_dir: str | os.PathLike, *, colour: bool, seed: int, data_dir: str | os.PathLike | None = None
) -> cache.Dataset:
    """Returns the splits "train" (45,000 images), "validation" (5,000) and "test" (10,000), read on first use and cached.

    Args:
      official_dir: folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin (`cifar-10-batches-bin`).
      colour: whether a pixel is three values, red, green and blue, or one grey value.
      seed: seed of the permutation whose last tenth is the validation split.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if a file is not 10,000 rows of a label and 3,072 bytes; names file and row.
    """
    folder = cache.expand("official_dir", official_dir)
    paths = [folder / name for name in (*TRAIN_FILES, TEST_FILE)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"official_dir={str(folder)!r} lacks {', '.join(missing)}; unpack CIFAR-10's binary version "
            "(cifar-10-binary.tar.gz) and give the folder cifar-10-batches-bin"
        )

    def build() -> dict[str, Sequences]:
        parts = [read(path, colour=colour) for path in paths]
        pixels = np.concatenate([pixels for pixels, _ in parts[:-1]])
        labels = np.concatenate([labels for _, labels in parts[:-1]])
        rows = dict(zip(("train", "validation"), hold_out(len(labels), len(labels) // 10, seed=seed)))
        splits = {name: _sequences(pixels[chosen], labels[chosen]) for name, chosen in rows.items()}
        return splits | {"test": _sequences(*parts[-1])}

    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    recipe = cache.Recipe(
        name="cifar10",
        version=VERSION,
        parameters=dict(colour=colour, seed=seed, files=digests),
        vocabulary=tuple(map(str, range(256))),
        rebuild=f"python -m experiments.data.prepare cifar10 --seed={seed}{' --colour' if colour else ''} "
        f"--official_dir={shlex.quote(str(folder))}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def read(path: Path, *, colour: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels, uint8 (n, 1024 * channels) with the channels of a pixel side by side, and labels of a file.

    Raises:
      ValueError: if the file has another size or a label above 9; names file and row.
    """
    content = np.fromfile(path, np.uint8)
    if len(content) != ROWS * ROW_BYTES:
        rows, rest = divmod(len(content), ROW_BYTES)
        raise ValueError(
            f"{path}: row {rows + 1} has {rest} bytes; expected {ROWS} rows of {ROW_BYTES} bytes, {ROWS * ROW_BYTES} in "
            f"all, got {len(content)}"
        )
    content = content.reshape(ROWS, ROW_BYTES)
    labels = content[:, 0].astype(np.int32)
    if labels.max() >= CLASSES:
        row = int(np.argmax(labels >= CLASSES))
        raise ValueError(f"{path}: row {row + 1} has the label {labels[row]}; expected 0 to {CLASSES - 1}")
    planes = content[:, 1:].reshape(ROWS, 3, SIDE * SIDE)
    if colour:
        return planes.transpose(0, 2, 1).reshape(ROWS, -1), labels
    red, green, blue = (planes[:, channel].astype(np.uint32) for channel in range(3))
    grey = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 0x8000) >> 16
    return grey.astype(np.uint8), labels


def _sequences(pixels: np.ndarray, labels: np.ndarray) -> Sequences:
    return Sequences(pixels.ravel(), np.arange(len(labels) + 1) * pixels.shape[1], labels)
