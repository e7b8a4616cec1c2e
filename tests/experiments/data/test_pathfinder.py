"""Images of Pathfinder against the definition, and against themselves however many processes draw them."""

import hashlib

import numpy as np
import pytest
from scipy import ndimage

from experiments.data import pathfinder
from experiments.data.pathfinder import BLOCK, PathfinderConfig, draw_block
from experiments.data.pathfinder_segments import DEGREES, PARAMETERS, make_segments, marker
from experiments.data.pathfinder_snakes import TARGET_SEGMENTS, Draws, draw_distractors, draw_targets


def test_images_depend_on_nothing_but_size_seed_and_place():
    config = PathfinderConfig(train=BLOCK, validation=1, test=2, seed=3)
    images, labels = pathfinder.generate(config, workers=1)
    parallel, parallel_labels = pathfinder.generate(config, workers=2)
    np.testing.assert_array_equal(images, parallel)
    np.testing.assert_array_equal(labels, parallel_labels)
    np.testing.assert_array_equal(images[BLOCK:], draw_block(32, 3, 1)[0][:3])
    assert not np.array_equal(images[:BLOCK], draw_block(32, 4, 0)[0])
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "ca570f958cda3e90"


def test_statistics_of_the_images():
    images, labels = (
        np.concatenate(parts) for parts in zip(*(draw_block(32, 0, i) for i in range(4)), strict=True)
    )
    assert abs(labels.mean() - 0.5) < 3 * 0.5 / len(labels) ** 0.5
    assert np.all(images.min((1, 2)) == 0)
    assert np.all(images.max((1, 2)) == 255)
    # Neither ink nor its spread tells the label.
    for feature in (images.mean((1, 2)), images.std((1, 2)), (images > 128).mean((1, 2))):
        assert abs(np.corrcoef(feature, labels)[0, 1]) < 3.5 / len(labels) ** 0.5
    mean, inked, bright = images.mean(), np.mean(images > 0), np.mean(images > 128)
    # 30 images of the published generator of 2019 have 20.2, 0.342 and 0.086.
    assert (mean, inked, bright) == (
        pytest.approx(20.2, abs=0.8),
        pytest.approx(0.34, abs=0.012),
        pytest.approx(0.086, abs=0.004),
    )


@pytest.mark.parametrize("size, margin", [(32, 1), (128, 2)])
def test_snakes_obey_the_definition(size, margin):
    segments, p = make_segments(size, margin), PARAMETERS[size]
    board = draw_targets(segments, Draws(size, 1), 8)
    paths = board.paths
    assert paths.shape == (8, 2, TARGET_SEGMENTS, 2)
    assert paths.min() >= 0
    assert paths.max() < size
    between = np.hypot(*(paths[:, 0, 0] - paths[:, 1, 0]).T)
    assert np.all(np.abs(between - p.seed_distance) <= 1)
    # A pivot moves by length + 2 margin, and a start lies length + margin from it: both up to one pixel for rounding.
    length = np.hypot(*np.moveaxis(np.diff(paths[:, :, 1:], axis=2), -1, 0))
    assert np.all(length <= 2 * p.length + 3 * margin + 4)
    assert np.all(length >= 1)
    lines = board.crop(board.targets)
    assert all(lines[row][tuple(paths[row].reshape(-1, 2).T)].min() > 0.1 for row in range(8))
    before = board.mask.copy()
    draw_distractors(board, Draws(size, 2))
    assert np.all(board.mask >= before)
    dashes = [ndimage.label(image > 0.25, np.ones((3, 3)))[1] for image in board.crop(board.others)]
    assert 0.5 <= np.mean(dashes) <= 4 * p.distractors


def test_segments_are_those_of_the_definition():
    segments = make_segments(32, 1)
    lines, masks = (patches.reshape(len(patches), 9, 9) for patches in segments.patches)
    right = DEGREES // 2
    assert np.argwhere(lines[right] > 50).tolist() == [[4, 4], [4, 5], [4, 6]]
    assert np.argwhere(masks[right] > 127).tolist() == [
        [r, c] for r in (3, 4, 5) for c in range(3, 8) if r == 4 or 4 <= c <= 6
    ]
    assert len(segments.candidates) == len({tuple(c) for c in segments.candidates.tolist()})
    assert np.abs(segments.candidates).max() <= 3
    straight = segments.weights[right].argmax()
    assert segments.candidates[straight].tolist() in ([0, 2], [0, 3], [-1, 2])
    assert np.all(segments.weights[right][segments.candidates[:, 1] <= 0] == 0)  # never backwards
    assert marker(1.5).max() == 255


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(size=64), ValueError, "size=64 has no parameters; choose from 32, 128, 256"),
        (dict(train=0), ValueError, "train must be at least 1"),
        (dict(seed=1.0), TypeError, "seed must be an integer"),
    ],
)
def test_wrong_configurations_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        PathfinderConfig(**options)


def test_no_worker_is_refused():
    with pytest.raises(ValueError, match="workers must be at least 1"):
        pathfinder.generate(PathfinderConfig(train=1, validation=1, test=1), workers=0)
