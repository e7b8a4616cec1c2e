"""Log-mel spectrograms against their definition, one window, frequency and band at a time."""

import math

import numpy as np
import pytest

from experiments.data.log_mel import log_mel


def mel(hertz):
    return hertz / (200 / 3) if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def hertz(value):
    return value * 200 / 3 if value < 15 else 1000 * 6.4 ** ((value - 15) / 27)


def literal(x):
    edges = [hertz(mel(8000) * b / 81) for b in range(82)]
    filters = np.zeros((201, 80))
    for j in range(201):
        f = 40.0 * j
        for b, (low, centre, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
            height = 2 / (high - low)
            if low < f <= centre:
                filters[j, b] = height * (f - low) / (centre - low)
            elif centre < f < high:
                filters[j, b] = height * (high - f) / (high - centre)
    mirrored = np.concatenate([x[200:0:-1], x, x[-2:-202:-1]])
    n = np.arange(400)
    waves = np.exp(-2j * np.pi * np.outer(n, np.arange(201)) / 400)
    rows = []
    for k in range(len(x) // 160):
        part = mirrored[160 * k : 160 * k + 400] * np.sin(np.pi * n / 400) ** 2
        rows.append(np.log10(np.maximum(np.abs(part @ waves) ** 2 @ filters, 1e-10)))
    levels = np.array(rows)
    return (np.maximum(levels, levels.max() - 8) + 4) / 4


def test_equals_the_definition():
    """Noise, and a tone in silence, whose quiet bands are raised to 8 below the loudest."""
    time = np.arange(1700) / 16_000
    tone = np.where(time < 0.05, np.sin(2 * np.pi * 700 * time), 0)
    x = np.stack([np.random.default_rng(0).uniform(-1, 1, 1700), tone])
    got = log_mel(x)
    assert got.shape == (2, 10, 80)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.stack([literal(row) for row in x]), atol=1e-5)
    assert (got[1] == got[1].min()).sum() > 100


def test_short_recordings_are_refused():
    with pytest.raises(
        ValueError, match=r"samples have shape \(1, 200\); expected \(b, t\) with t of at least 201"
    ):
        log_mel(np.zeros((1, 200)))
