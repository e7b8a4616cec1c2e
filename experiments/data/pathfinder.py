"""Pathfinder of Long Range Arena (Linsley et al. 2018; Tay et al. 2021), generated from a seed.

Two long dashed snakes grow side by side among short ones. A disc marks an end of a long snake, and a second disc either
the other end of the same snake (label 1) or that of the other one (label 0). The definition is that of the published
generator with Long Range Arena's parameters for contours of 14 segments: one margin per image, two first segments
`seed_distance` apart, 13 rounds in which both snakes grow by one segment, and short snakes of 4 segments in what is left.
A segment may touch the one before it, as its mask is added one step late; a snake that cannot grow discards the image.

Two things make this fast without changing that distribution. Every segment has one of few directions, so all are drawn
once (see `pathfinder_segments`). Images are drawn many at a time in step, as arrays, and those that fail are replaced.

Draws come from NumPy's Philox generator in blocks of `BLOCK` images, each with a seed of its own: image i depends only on
size, seed and i.
"""

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np

from experiments.data.pathfinder_segments import PARAMETERS, Segments, make_segments, marker, stretch
from experiments.data.pathfinder_snakes import Draws, draw_distractors, draw_targets
from experiments.data.work import available_cores, worker_died

VERSION = 1  # increment when the images of a configuration change
SPLITS = ("train", "validation", "test")
BLOCK = 64  # number of images drawn from one seed, the unit of parallel work


@dataclasses.dataclass(frozen=True)
class PathfinderConfig:
    """The size of the images, their number per split, and the seed.

    Raises:
      TypeError: if a field is not an integer.
      ValueError: if a field is out of range.
    """

    size: int = 32
    train: int = 160_000
    validation: int = 20_000
    test: int = 20_000
    seed: int = 0

    def __post_init__(self):
        for name, smallest in dict(size=1, train=1, validation=1, test=1, seed=0).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.size not in PARAMETERS:
            raise ValueError(
                f"size={self.size} has no parameters; choose from {', '.join(map(str, PARAMETERS))}"
            )

    @property
    def total(self) -> int:
        return self.train + self.validation + self.test


def generate(
    config: PathfinderConfig, *, workers: int | None = None, report: Callable[[int], object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images of all splits, uint8 (n, size, size), and their labels, int32 (n,), in the order of `SPLITS`.

    Args:
      workers: number of processes; None takes every available core, or one for a small data set. With more than
        one, a script that calls this at its top level must do so under `if __name__ == "__main__":`.
      report: function called with the number of images added, block by block.

    Raises:
      ValueError: if `workers` is below one.
      RuntimeError: if a worker process dies.
    """
    blocks = -(-config.total // BLOCK)
    if workers is None:
        # Starting processes takes longer than a small data set.
        workers = 1 if config.total * config.size**2 < 2_000_000 else available_cores()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    images = np.empty((config.total, config.size, config.size), np.uint8)
    labels = np.empty(config.total, np.int32)
    start = 0
    for drawn, drawn_labels in _blocks(partial(draw_block, config.size, config.seed), blocks, workers):
        count = min(BLOCK, config.total - start)
        images[start : start + count], labels[start : start + count] = drawn[:count], drawn_labels[:count]
        start += count
        if report is not None:
            report(count)
    return images, labels


def _blocks(
    draw: Callable[[int], tuple], blocks: int, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if workers == 1:
        yield from map(draw, range(blocks))
        return
    # Spawned, not forked: a fork of a process with JAX's threads can deadlock.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(draw, range(blocks), chunksize=4)
        except BrokenProcessPool as error:
            raise worker_died("Pathfinder") from error


def draw_block(size: int, seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `BLOCK` images (uint8) and labels (int32) of one block."""
    draws = Draws(size, seed, block)
    margins = PARAMETERS[size].margins
    chosen = draws.below(len(margins), BLOCK)
    images, labels = np.empty((BLOCK, size, size), np.uint8), np.empty(BLOCK, np.int32)
    for index, margin in enumerate(margins):
        rows = np.flatnonzero(chosen == index)
        if len(rows):
            images[rows], labels[rows] = _draw_images(make_segments(size, margin), draws, len(rows))
    return images, labels


def _draw_images(segments: Segments, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
    p = segments.parameters
    board = draw_targets(segments, draws, count)
    draw_distractors(board, draws)
    label, origin = draws.below(2, count), draws.below(2, count)
    rows = np.arange(count)
    terminal = np.where(label == 1, origin, 1 - origin)
    image = np.maximum(
        p.target_contrast * board.crop(board.targets), p.distractor_contrast * board.crop(board.others)
    )
    discs = np.zeros_like(board.mask)
    patch = marker(p.marker_radius)
    for points in (board.paths[rows, origin, 0], board.paths[rows, terminal, -1]):
        board.paste(discs, rows, points, np.broadcast_to(patch.ravel(), (count, patch.size)))
    return stretch(np.maximum(image, board.crop(discs))), label.astype(np.int32)
