"""An hourly series with periods of a day and a week, from a seed: a stand-in where no file of a series is given."""

import numpy as np

COLUMNS = ("north", "south", "total")
HOURS = 20 * 30 * 24
SEED = 0
NOISE = 0.1  # standard deviation of what each hour adds to the weather


def daily_series() -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the names of the values and the values, float64 (14400, 3).

    Two regions have a daily and a weekly rhythm of their own, a yearly one, and weather that decays over about two days; the third
    value is their sum.
    """
    draws = np.random.Philox(np.random.SeedSequence(SEED)).random_raw((HOURS, 2, 12))
    # Sums of twelve uniform numbers, by integer arithmetic: the same on every machine and NumPy.
    normal = ((draws >> np.uint64(11)).astype(np.int64).sum(axis=-1) - 6 * 2**53) * 2.0**-53
    weather = np.zeros((HOURS, 2))
    for hour in range(1, HOURS):
        weather[hour] = 0.98 * weather[hour - 1] + NOISE * normal[hour]
    hours = np.arange(HOURS)[:, None]
    phase = np.array([0.0, 3.0])
    day = np.cos(2 * np.pi * (hours - phase) / 24) + 0.4 * np.cos(4 * np.pi * (hours - 2 * phase) / 24)
    week = np.where(hours // 24 % 7 < 5, 0.5, -0.8)
    year = np.cos(2 * np.pi * hours / (365 * 24))
    # Rounded, so that cosines that differ in their last bit give the same series.
    regions = np.round(10 + 2 * day + week + year + weather, 3)
    return COLUMNS, np.concatenate([regions, regions.sum(axis=1, keepdims=True)], axis=1)
