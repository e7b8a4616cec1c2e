"""Pathfinder data sets, cached: generated from a seed, or read from Long Range Arena's own files."""

import dataclasses
import hashlib
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data import cache, pathfinder
from experiments.data.pathfinder import PathfinderConfig
from experiments.data.progress import progress
from experiments.data.sequences import Sequences

VOCABULARY = tuple(map(str, range(256)))
METADATA = "metadata"


def load_generated(
    config: PathfinderConfig, *, data_dir: str | os.PathLike | None = None, workers: int | None = None
) -> cache.Dataset:
    """Returns the data set that `config` describes, generated on first use and cached (see `cache.load_or_build`)."""

    def build() -> dict[str, Sequences]:
        with progress("Generating Pathfinder", config.total, "images") as bar:
            images, labels = pathfinder.generate(config, workers=workers, report=bar.update)
        ends = np.cumsum([getattr(config, split) for split in pathfinder.SPLITS])
        return _split(images, labels, ends[:-1].tolist())

    parameters = dataclasses.asdict(config)
    options = " ".join(f"--{name}={value}" for name, value in parameters.items())
    recipe = cache.Recipe(
        name="pathfinder",
        version=pathfinder.VERSION,
        parameters=parameters,
        vocabulary=VOCABULARY,
        rebuild=f"python -m experiments.data.prepare pathfinder {options}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def load_official(
    official_dir: str | os.PathLike, *, size: int, data_dir: str | os.PathLike | None = None
) -> cache.Dataset:
    """Returns the data set of Long Range Arena's files, read on first use and cached.

    Files are taken in the order of their numbers and their rows; the first 80% are "train", the next 10% "validation" and
    the rest "test", as in Long Range Arena's own pipeline. Images whose file is empty are left out.

    Args:
      official_dir: folder of one difficulty, such as lra_release/pathfinder32/curv_contour_length_14, with metadata/N.npy
        (text, in spite of the name: "folder file index label ..." in each row) and the PNG files that the rows name.
      size: side of the images.

    Raises:
      FileNotFoundError: if the folder has no metadata.
      ValueError: if a row or its image is not as described; names file and row.
    """
    folder = cache.expand("official_dir", official_dir)
    files = sorted((folder / METADATA).glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise FileNotFoundError(
            f"official_dir={str(folder)!r} has no {METADATA}/*.npy; give the folder of one difficulty of the Long Range "
            "Arena release, such as pathfinder32/curv_contour_length_14, or leave official_dir out to generate the data"
        )

    def build() -> dict[str, Sequences]:
        with progress("Reading Pathfinder", None, "images") as bar:
            images, labels = [], []
            for image, label in _read_official(folder, files, size):
                images.append(image)
                labels.append(label)
                bar.update(1)
        count = len(images)
        if count < 10:
            raise ValueError(
                f"official_dir={str(folder)!r} has {count} images; at least 10 are needed for three splits"
            )
        return _split(np.stack(images), np.array(labels, np.int32), [count * 8 // 10, count * 9 // 10])

    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    recipe = cache.Recipe(
        name="pathfinder-official",
        version=pathfinder.VERSION,
        parameters=dict(size=size, metadata=digest.hexdigest()),
        vocabulary=VOCABULARY,
        rebuild="python -m experiments.data.prepare pathfinder "
        f"--size={size} --official_dir={shlex.quote(str(folder))}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Returns one picture of images (n, size, size) in rows of `columns`, with a line between them."""
    count, size, _ = images.shape
    rows = math.ceil(count / columns)
    picture = np.full((rows * (size + 1) - 1, columns * (size + 1) - 1), 96, np.uint8)
    for number, image in enumerate(images):
        top, left = (part * (size + 1) for part in divmod(number, columns))
        picture[top : top + size, left : left + size] = image
    return Image.fromarray(picture)


def _split(images: np.ndarray, labels: np.ndarray, bounds: list[int]) -> dict[str, Sequences]:
    pixels = images[0].size
    parts = zip(pathfinder.SPLITS, np.split(images, bounds), np.split(labels, bounds), strict=True)
    return {
        split: Sequences(part.ravel(), np.arange(len(part) + 1) * pixels, split_labels)
        for split, part, split_labels in parts
    }


def _read_official(folder: Path, files: list[Path], size: int) -> Iterator[tuple[np.ndarray, int]]:
    for path in files:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                fields = line.decode("ascii", "replace").split()
                if len(fields) < 4 or fields[3] not in ("0", "1"):
                    raise ValueError(
                        f"expected 'folder file index label ...' with label 0 or 1, got {line[:80]!r}"
                    )
                image = folder / fields[0] / fields[1]
                if not image.is_file():
                    raise ValueError(f"the image {fields[0]}/{fields[1]} does not exist")
                if image.stat().st_size:
                    yield _read_image(image, size), int(fields[3])
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def _read_image(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            found, mode = image.size, image.mode
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no image that can be read ({error})") from None
    if found != (size, size) or mode not in ("L", "RGB"):
        raise ValueError(
            f"{path} has {found[0]} x {found[1]} pixels of mode {mode}, but size={size} needs {size} x {size} L"
        )
    return pixels
