"""Snakes of Pathfinder, many images at a time in step: long ones that grow side by side, and short ones among them."""

import functools
import math

import numpy as np

from experiments.data.pathfinder_segments import DEGREES, WEIGHT_UNIT, Segments, disc, shift

TARGET_SEGMENTS, DISTRACTOR_SEGMENTS = 14, 4
SEED_TRIES = SEGMENT_TRIES = 3
SNAKE_TRIES = 5
ATTEMPTS = 6  # number of attempts at a time, for every image
LEAST_FREE = 0.01  # fraction of the pixels below which no further snake starts
OCCUPIED = 76  # a pixel is occupied if its mask, of 255, is larger
TOUCHING = 459  # 1.8 times 255: sum of two masks that a new segment must stay below


class Draws:
    """Uniform draws of one block, from the raw output of the Philox generator, which NumPy promises not to change."""

    def __init__(self, *entropy: int):
        self._bits = np.random.Philox(np.random.SeedSequence(entropy))

    def uniform(self, count: int) -> np.ndarray:
        """Returns uniform floats in [0, 1), (count,)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, bound: int | np.ndarray, count: int) -> np.ndarray:
        """Returns uniform integers from 0 to `bound` - 1, (count,); a bound of 0 gives 0."""
        return (self.uniform(count) * bound).astype(np.int64)


class Board:
    """Images in the making: masks, lines and paths. Arrays have a border that pieces may reach into.

    Attributes:
      mask: where new segments may not go, uint8 (n, s, s); 0 outside the image.
      targets, others: lines of the two long snakes and of the short ones, uint8 (n, s, s).
      paths: start of every segment of the long snakes, (n, 2, segments, 2).
    """

    def __init__(self, segments: Segments, count: int):
        self.segments = segments
        p = segments.parameters
        self.border = segments.half + 3 * segments.margin + p.length + math.ceil(p.marker_radius) + 4
        self.side = p.window + 2 * self.border
        self.inside = np.zeros((self.side, self.side), np.uint8)
        self.inside[self.border : -self.border, self.border : -self.border] = 1
        frame = 255 * self.inside
        inner = slice(self.border + p.padding, self.side - self.border - p.padding)
        frame[inner, inner] = 0
        self.mask = np.repeat(frame[None], count, 0)
        self.targets, self.others = np.zeros_like(self.mask), np.zeros_like(self.mask)
        self.paths = np.zeros((count, 2, TARGET_SEGMENTS, 2), np.int64)
        self._gap = disc(segments.margin) @ (self.side, 1)

    def keep(self, rows: np.ndarray) -> None:
        """Keeps the images `rows` (indices or truth values) only."""
        for name in ("mask", "targets", "others", "paths"):
            setattr(self, name, getattr(self, name)[rows])

    def crop(self, array: np.ndarray) -> np.ndarray:
        """Returns the part of an array (n, s, s) inside the image, scaled to [0, 1]."""
        window = slice(self.border, -self.border)
        return array[:, window, window] / 255.0

    def where(self, rows: np.ndarray, points: np.ndarray, side: int) -> np.ndarray:
        """Returns the flat indices of patches of this side around points (n, 2), (n, side * side)."""
        reach = np.arange(side) - side // 2
        patch = (reach[:, None] * self.side + reach).ravel()
        return (rows * self.side**2 + (points + self.border) @ (self.side, 1))[:, None] + patch

    def paste(self, array: np.ndarray, rows: np.ndarray, points: np.ndarray, patches: np.ndarray) -> None:
        """Raises an array, which changes, to at least the patches (n, side * side) around points of different rows."""
        index = self.where(rows, points, round(patches.shape[1] ** 0.5))
        flat = array.reshape(-1)
        flat[index] = np.maximum(flat[index], patches)

    def block(self, mask: np.ndarray, rows: np.ndarray, points: np.ndarray, chosen: np.ndarray) -> None:
        """Adds the masks of the `chosen` segments, clipped to the image, to a mask, which changes."""
        patches = self.segments.patches[1][chosen]
        index = self.where(np.zeros_like(rows), points, 2 * self.segments.half + 1)
        self.paste(mask, rows, points, patches * self.inside.reshape(-1)[index])

    def grow(
        self, mask: np.ndarray, rows: np.ndarray, pivots: np.ndarray, last: np.ndarray, draws: Draws
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns for snakes in `rows` whether they grow, their pivots, new heads and the index of the new segments."""
        segments, count = self.segments, len(rows)
        pivots = pivots + segments.steps[last]
        points = pivots[:, None] + segments.candidates
        valid = _contains(segments, points)
        place = np.where(
            valid, (points + self.border) @ (self.side, 1), self.side * self.border + self.border
        )
        near = mask.reshape(-1)[(rows * self.side**2)[:, None, None] + place[..., None] + self._gap].max(-1)
        weights = valid * (255 - near.astype(np.int64)) * segments.weights[last]
        cumulative = np.cumsum(weights, 1)
        total = cumulative[:, -1]
        grown = np.zeros(count, bool)
        heads, chosen = np.zeros((count, 2), np.int64), np.full(count, DEGREES)
        waiting = np.flatnonzero(total >= 1e-4 * 255 * WEIGHT_UNIT)
        for _ in range(SEGMENT_TRIES):
            if not len(waiting):
                break
            level = draws.below(total[waiting], len(waiting))
            pick = (cumulative[waiting] <= level[:, None]).sum(1)
            head, segment = points[waiting, pick], DEGREES + pick
            index = self.where(rows[waiting], head, 2 * segments.half + 1)
            sums = mask.reshape(-1)[index].astype(np.int16) + segments.patches[1][segment]
            good = sums.max(1) < TOUCHING
            done = waiting[good]
            grown[done], heads[done], chosen[done] = True, head[good], segment[good]
            waiting = waiting[~good]
        return grown, pivots, heads, chosen


def _contains(segments: Segments, points: np.ndarray) -> np.ndarray:
    """Returns whether points (..., 2) are pixels of the image."""
    return ((points >= 0) & (points < segments.parameters.window)).all(-1)


def _seed_ends(segments: Segments, tails: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns heads and pivots of first segments that start at `tails`."""
    length, angles = segments.parameters.length, segments.angles[chosen]
    heads = tails + shift(angles, length)
    return heads, heads + shift(angles + math.pi, length + segments.margin)


def _overlaps(mask: np.ndarray, kernels: np.ndarray, window: int) -> np.ndarray:
    """Returns for each pixel whether a segment that starts there meets an occupied pixel, (n, window, window).

    Args:
      mask: masks of images, (n, window, window).
      kernels: pixels around the start of one segment per image, bool (n, side * side).
    """
    side = round(kernels.shape[1] ** 0.5)
    size = window + side
    segment = kernels.astype(np.float32).reshape(-1, side, side)
    spectra = np.fft.rfft2((mask > OCCUPIED).astype(np.float32), (size, size))
    spectra *= np.conj(np.fft.rfft2(segment, (size, size)))
    counts = np.roll(np.fft.irfft2(spectra, (size, size)), side // 2, (1, 2))
    return counts[:, :window, :window] > 0.5


def draw_targets(segments: Segments, draws: Draws, count: int) -> Board:
    """Returns a board with the two long snakes of `count` images; attempts that fail are replaced."""
    boards, found = [], 0
    while found < count:
        boards.append(_attempt_targets(segments, draws, ATTEMPTS * count))
        found += len(boards[-1].mask)
    board = boards[0]
    for name in ("mask", "targets", "others", "paths"):
        setattr(board, name, np.concatenate([getattr(other, name) for other in boards])[:count])
    return board


def _attempt_targets(segments: Segments, draws: Draws, count: int) -> Board:
    board = Board(segments, count)
    tails, pivots, last = _first_seeds(segments, draws, count)
    second_tails, second_pivots, second_last, good = _second_seeds(segments, tails, draws)
    heads, pivots = np.stack([tails, second_tails]), np.stack([pivots, second_pivots])
    last, alive = np.stack([last, second_last]), good
    for number in range(TARGET_SEGMENTS):
        board.keep(alive)
        heads, pivots, last = heads[:, alive], pivots[:, alive], last[:, alive]
        rows = np.arange(len(board.mask))
        alive = np.ones(len(rows), bool)
        for snake in range(2):
            if number:
                grown, new_pivots, new_heads, chosen = board.grow(
                    board.mask, rows, pivots[snake], last[snake], draws
                )
                alive &= grown
                board.block(board.mask, rows, heads[snake], last[snake])
                heads[snake], pivots[snake], last[snake] = new_heads, new_pivots, chosen
            board.paste(board.targets, rows, heads[snake], segments.patches[0][last[snake]])
            board.paths[:, snake, number] = heads[snake]
    board.block(board.mask, rows, heads[1], last[1])  # not the first snake's, as in the published generator
    board.keep(alive)
    return board


@functools.cache
def _first_tails(segments: Segments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the degrees of possible first segments, the number of their places, and these as flat indices."""
    window, far = segments.parameters.window, 2 * segments.parameters.seed_distance
    frame = np.full((1, window, window), 255, np.uint8)
    frame[:, far : window - far, far : window - far] = 0
    free = {
        degree: np.flatnonzero(~_overlaps(frame, segments.kernels[degree, None], window))
        for degree in np.flatnonzero(segments.seeds).tolist()
    }
    free = {degree: places for degree, places in free.items() if len(places)}
    counts = np.array([len(places) for places in free.values()])
    indices = np.zeros((len(free), counts.max()), np.int32)
    for row, places in zip(indices, free.values(), strict=True):
        row[: len(places)] = places
    return np.array(list(free)), counts, indices


def _first_seeds(segments: Segments, draws: Draws, count: int) -> tuple[np.ndarray, ...]:
    """Returns tails, pivots and indices of first segments near the middle."""
    # Attempts with any other degree fail and would be replaced.
    degrees, counts, indices = _first_tails(segments)
    row = draws.below(len(degrees), count)
    chosen, pixels = degrees[row], indices[row, draws.below(counts[row], count)]
    tails = np.stack(np.divmod(pixels, segments.parameters.window), -1).astype(np.int64)
    _, pivots = _seed_ends(segments, tails, chosen)
    return tails, pivots, chosen


def _second_seeds(segments: Segments, tails: np.ndarray, draws: Draws) -> tuple[np.ndarray, ...]:
    """Returns the same at the seed distance from `tails`, and whether the segments are inside the image."""
    count, distance = len(tails), segments.parameters.seed_distance
    chosen, angles = draws.below(DEGREES, count), np.radians(draws.below(DEGREES, count))
    offsets = np.rint(np.round(distance * np.stack([np.sin(angles), np.cos(angles)], -1), 9)).astype(np.int64)
    tails = tails + offsets
    heads, pivots = _seed_ends(segments, tails, chosen)
    return (
        tails,
        pivots,
        chosen,
        _contains(segments, tails) & _contains(segments, heads) & _contains(segments, pivots),
    )


def draw_distractors(board: Board, draws: Draws) -> None:
    """Adds the short snakes to a board; one that finds no place in `SNAKE_TRIES` tries is left out."""
    for _ in range(board.segments.parameters.distractors):
        waiting = np.arange(len(board.mask))
        for _ in range(SNAKE_TRIES):
            if len(waiting):
                waiting = waiting[~_try_distractor(board, waiting, draws)]


def _try_distractor(board: Board, images: np.ndarray, draws: Draws) -> np.ndarray:
    """Returns which of the images get one more short snake; the others do not change."""
    segments = board.segments
    heads, pivots, last, alive = _free_seeds(board, images, draws)
    mask = board.mask[images]
    lines = np.zeros_like(mask)
    rows = np.flatnonzero(alive)
    for number in range(DISTRACTOR_SEGMENTS):
        if number:
            grown, new_pivots, new_heads, chosen = board.grow(mask, rows, pivots[rows], last[rows], draws)
            board.block(mask, rows, heads[rows], last[rows])
            heads[rows], pivots[rows], last[rows] = new_heads, new_pivots, chosen
            rows = rows[grown]
        board.paste(lines, rows, heads[rows], segments.patches[0][last[rows]])
    board.block(mask, rows, heads[rows], last[rows])
    done = np.zeros(len(images), bool)
    done[rows] = True
    board.mask[images[rows]] = mask[rows]
    board.others[images[rows]] = np.maximum(board.others[images[rows]], lines[rows])
    return done


def _free_seeds(board: Board, images: np.ndarray, draws: Draws) -> tuple[np.ndarray, ...]:
    """Returns tails, pivots and indices of segments at free places of some images, and whether one was found."""
    segments, window, count = board.segments, board.segments.parameters.window, len(images)
    inner = slice(board.border, board.border + window)
    mask = board.mask[images, inner, inner]
    tails, pivots = np.zeros((2, count, 2), np.int64)
    chosen, found = np.zeros(count, np.int64), np.zeros(count, bool)
    waiting = np.arange(count)
    for _ in range(SEED_TRIES):
        degrees = draws.below(DEGREES, len(waiting))
        possible = segments.seeds[degrees]
        waiting, degrees = waiting[possible], degrees[possible]
        if not len(waiting):
            break
        free = ~_overlaps(mask[waiting], segments.kernels[degrees], window).reshape(len(waiting), -1)
        numbers = free.sum(1)
        number = draws.below(numbers, len(waiting))
        pixels = (np.cumsum(free, 1, dtype=np.int32) > number[:, None]).argmax(1)
        tail = np.stack(np.divmod(pixels, window), -1)
        head, pivot = _seed_ends(segments, tail, degrees)
        enough = (numbers > 0) & ((mask[waiting] <= OCCUPIED).mean((1, 2)) >= LEAST_FREE)
        good = enough & _contains(segments, head) & _contains(segments, pivot)
        done = waiting[good]
        tails[done], pivots[done], chosen[done], found[done] = tail[good], pivot[good], degrees[good], True
        waiting = waiting[enough & ~good]  # without room a further try would fail too
    return tails, pivots, chosen, found
