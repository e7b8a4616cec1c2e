"""Parameters and drawn pieces of Pathfinder: every segment and marker that an image can contain, drawn once."""

import dataclasses
import math
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw

SCALE = 2  # pieces are drawn this many times larger and reduced by Lanczos resampling
DEGREES = 360  # orientations of first segments, whole degrees from -180
WEIGHT_UNIT = 2**20  # weights of candidates are integers, so that no platform rounds their sums differently


@dataclasses.dataclass(frozen=True)
class PathfinderParameters:
    """Parameters of Long Range Arena for one size of image; lengths are in pixels.

    Attributes:
      window: side of the image.
      padding: width of the border that no snake may touch.
      length: length of a segment.
      thickness: width of a segment.
      margins: gaps around a segment; an image has one of them.
      seed_distance: distance between the first segments of the two long snakes.
      continuity: factor on the angle between successive segments; larger gives straighter snakes.
      marker_radius: radius of the two discs.
      distractors: number of short snakes.
      target_contrast, distractor_contrast: brightness of long and short snakes.
    """

    window: int
    padding: int
    length: int
    thickness: float
    margins: tuple[int, ...]
    seed_distance: int
    continuity: float
    marker_radius: float
    distractors: int
    target_contrast: float
    distractor_contrast: float


# Distractors of 32 are brighter than the targets in the published parameters.
PARAMETERS = {
    32: PathfinderParameters(32, 1, 2, 0.5, (1,), 7, 1.0, 1.5, 5, 1.5, 2.0),
    128: PathfinderParameters(128, 1, 5, 1.5, (2, 3), 20, 1.8, 3.0, 8, 0.9, 0.9),
    256: PathfinderParameters(256, 22, 5, 2.0, (3,), 27, 1.8, 5.0, 7, 1.0, 1.0),
}


def shift(angles: np.ndarray, distance: float) -> np.ndarray:
    """Returns the displacements (row, column) by `distance` along angles in radians, each component rounded up."""
    # Rounded first: sin(pi) is not exactly 0, and would count as one pixel.
    return np.ceil(np.round(distance * np.stack([np.sin(angles), np.cos(angles)], -1), 9)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Segments:
    """All segments of one size and margin, by index: first the seeds' (one per degree), then one per candidate.

    A candidate is a pixel on the circle of radius length + margin around the pivot, from which the segment is drawn
    back towards the pivot.
    """

    parameters: PathfinderParameters
    margin: int

    @cached_property
    def candidates(self) -> np.ndarray:
        """Offsets of the distinct candidates from the pivot, (k, 2)."""
        radius = self.parameters.length + self.margin
        angles = np.arange(0, 2 * math.pi - 1e-9, 1 / radius)
        points = np.floor(np.round(radius * np.stack([np.sin(angles), np.cos(angles)], -1), 9))
        return np.unique(points.astype(np.int64), axis=0)

    @cached_property
    def angles(self) -> np.ndarray:
        """Direction of growth of each segment, in radians."""
        seeds = np.radians(np.arange(DEGREES) - DEGREES // 2)
        return np.concatenate([seeds, np.arctan2(self.candidates[:, 0], self.candidates[:, 1])])

    @cached_property
    def steps(self) -> np.ndarray:
        """Displacement of the pivot when a snake grows from each segment, (n, 2)."""
        return shift(self.angles, self.parameters.length + 2 * self.margin)

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight of each candidate after each segment, int64 (n, k)."""
        difference = np.abs(self.angles[:, None] - self.angles[None, DEGREES:])
        angle = np.minimum(difference, 2 * math.pi - difference) * self.parameters.continuity
        return np.rint(WEIGHT_UNIT * np.cos(np.minimum(angle, math.pi / 2)) ** 2).astype(np.int64)

    @property
    def half(self) -> int:
        """Number of pixels of a patch on each side of its centre."""
        return self.parameters.length + math.ceil(self.parameters.thickness) + self.margin

    @cached_property
    def patches(self) -> tuple[np.ndarray, np.ndarray]:
        """Line and mask of each segment around its start, uint8 (n, side * side)."""
        backwards = self.angles[DEGREES:] + math.pi
        drawn = [self._draw(angle) for angle in (*self.angles[:DEGREES], *backwards)]
        lines, masks = zip(*drawn, strict=True)
        return np.stack(lines).reshape(len(drawn), -1), np.stack(masks).reshape(len(drawn), -1)

    @cached_property
    def kernels(self) -> np.ndarray:
        """Pixels around the start of each seed that must be free, bool (n, side * side).

        As in the published generator they are those where the mask is full, one pixel further down and right.
        """
        side, reach = 2 * self.half + 1, self.parameters.length + self.margin
        full = self.patches[1][:DEGREES].reshape(DEGREES, side, side) == 255
        kernels = np.zeros_like(full)
        within = slice(self.half - reach, self.half + reach + 1)
        before = slice(self.half - reach - 1, self.half + reach)
        kernels[:, within, within] = full[:, before, before]
        return kernels.reshape(DEGREES, -1)

    @cached_property
    def seeds(self) -> np.ndarray:
        """Seeds that the published generator can place, bool (n,).

        It refuses an orientation if all of its kernel lies outside the image at some pixel, a corner: there its dilation
        gives a negative mask. Few orientations are left, and so most short snakes find no place.
        """
        reach = np.arange(2 * self.half + 1) - self.half
        kernels = self.kernels.reshape(DEGREES, len(reach), len(reach))
        return np.all(
            [
                kernels[:, reach * row >= 0][:, :, reach * column >= 0].any((1, 2))
                for row in (-1, 1)
                for column in (-1, 1)
            ],
            0,
        )

    def _draw(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        centre = self.half * SCALE
        canvas = Image.new("L", (2 * centre + 1,) * 2)
        row, column = (centre + shift(np.array(angle), self.parameters.length * SCALE)).tolist()
        width = round(self.parameters.thickness * SCALE)
        ImageDraw.Draw(canvas).line([(centre, centre), (column, row)], fill=255, width=width)
        line = np.asarray(canvas)
        return _reduce(line, 2 * self.half + 1), _reduce(
            _dilate(line, disc(self.margin * SCALE)), 2 * self.half + 1
        )


@lru_cache
def make_segments(size: int, margin: int) -> Segments:
    """Returns the segments of images of `size` with this margin."""
    return Segments(PARAMETERS[size], margin)


def disc(radius: float) -> np.ndarray:
    """Returns the offsets (row, column) of the pixels of a disc, (n, 2)."""
    reach = np.arange(-math.floor(radius), math.floor(radius) + 1)
    rows, columns = np.meshgrid(reach, reach, indexing="ij")
    inside = rows**2 + columns**2 <= radius**2
    return np.stack([rows[inside], columns[inside]], -1)


@lru_cache
def marker(radius: float) -> np.ndarray:
    """Returns a marker around its centre, uint8 of odd side."""
    half = math.ceil(radius) + 3  # Lanczos resampling reaches three pixels far
    canvas = np.zeros(((2 * half + 1) * SCALE,) * 2, np.uint8)
    canvas[tuple((disc(radius * SCALE) + half * SCALE).T)] = 255
    return _reduce(canvas, 2 * half + 1)


def stretch(image: np.ndarray) -> np.ndarray:
    """Returns images (..., h, w) scaled so that the least value of each is 0 and the largest 255, uint8."""
    low, high = image.min((-2, -1), keepdims=True), image.max((-2, -1), keepdims=True)
    return np.floor((image - low) * (255.0 / (high - low)) + 0.5).astype(np.uint8)


def _reduce(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def _dilate(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    reach = int(np.abs(offsets).max(initial=0))
    padded, (height, width) = np.pad(image, reach), image.shape
    shifted = [
        padded[reach + r : reach + r + height, reach + c : reach + c + width] for r, c in offsets.tolist()
    ]
    return np.maximum.reduce(shifted)
