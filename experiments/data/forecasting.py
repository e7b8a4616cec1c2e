"""Windows of a time series: what came, and what comes after it. The source of pipelines.

A series is a CSV file in the format of ETT (Zhou et al. 2021, arXiv:2012.07436): a header "date,NAME,...", and a row per step of time. Its
splits are those of Informer: of ETTh1 and ETTh2 the first 12 months of 30 days, and the next 4 and 4; of ETTm1 and ETTm2, with a row
every 15 minutes, the same times; of any other file 70%, 10% and 20%. Validation and test begin `length` steps earlier, so that their
first window is followed by the first step of the split. All are scaled by mean and deviation of the training rows.
"""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.cache import expand
from experiments.data.synthetic_series import daily_series

MONTH = 30 * 24  # hours
MONTHS = (12, 4, 4)  # of training, validation and test
PER_HOUR = {"ETTh1": 1, "ETTh2": 1, "ETTm1": 4, "ETTm2": 4}
SHARES = (0.7, 0.1, 0.2)
SPLITS = ("train", "validation", "test")


class Series(NamedTuple):
    """A series of several values.

    Attributes:
      name: stem of its file.
      columns: names of the values.
      values: float64 (n, c), as they are in the file.
    """

    name: str
    columns: tuple[str, ...]
    values: np.ndarray


class Windows(NamedTuple):
    """The windows of a split.

    Attributes:
      values: float32 (n, c), scaled.
      length, horizon: steps of a window, and steps after it.
      inputs, targets: which of the c values a window holds, and which are asked for.
    """

    values: np.ndarray
    length: int
    horizon: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.values) - self.length - self.horizon + 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of steps of each window."""
        return np.full(len(self), self.length)

    def gather(self, indices: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Returns windows that start at `indices`: inputs (b, t, i) and labels (b, horizon * targets), by step, float32.

        Raises:
          ValueError: if `width` is not the number of steps of a window.
        """
        if width != self.length:
            raise ValueError(f"windows of {self.length} steps are not padded to {width}")
        starts = np.asarray(indices)[:, None]
        past = self.values[starts + np.arange(self.length)]
        after = self.values[starts + self.length + np.arange(self.horizon)]
        return {
            "inputs": past[..., list(self.inputs)],
            "labels": after[..., list(self.targets)].reshape(len(starts), -1),
        }


def load(file: str | None) -> Series:
    """Returns the series of a file, or a stand-in of hourly values with periods of a day and a week if None.

    Raises:
      ValueError: if there is no such file, or it is not in ETT's format; names the row.
    """
    if file is None:
        return Series("stand_in", *daily_series())
    path = expand("task.file", file)
    if not path.is_file():
        raise ValueError(f"task.file={str(file)!r} is no file; expected a CSV file such as ETTh1.csv")
    return read(path)


def read(path: Path) -> Series:
    """Returns the series of a CSV file with a header and the time of each row in the first column."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    header = rows[0] if rows else []
    if len(header) < 2 or _is_number(header[1]):
        raise ValueError(f"{path}, row 1: {','.join(header)!r}; expected a header such as date,HUFL,OT")
    if len(set(header)) < len(header):
        raise ValueError(f"{path}, row 1: {','.join(header)!r}; expected names that differ")
    values = np.zeros((len(rows) - 1, len(header) - 1))
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} values; expected {len(header)}")
        for place, text in enumerate(row[1:]):
            if not _is_number(text):
                raise ValueError(
                    f"{path}, row {number}: {header[place + 1]} is {text!r}; expected a finite number"
                )
            values[number - 2, place] = float(text)
    return Series(path.stem, tuple(header[1:]), values)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def split(
    series: Series, *, length: int, horizon: int, inputs: tuple[int, ...], targets: tuple[int, ...]
) -> dict[str, Windows]:
    """Returns the splits of a series.

    Raises:
      ValueError: if a split has no window.
    """
    ends = boundaries(series)
    starts = [0, *(max(0, end - length) for end in ends[:-1])]
    for name, start, end in zip(SPLITS, starts, ends, strict=True):
        if end - start < length + horizon:
            raise ValueError(
                f"the split {name!r} of {series.name} has {end - start} rows; windows of task.length={length} and "
                f"task.horizon={horizon} need {length + horizon}"
            )
    train = series.values[: ends[0]]
    scale = train.std(axis=0)
    scaled = ((series.values - train.mean(axis=0)) / np.where(scale > 0, scale, 1.0)).astype(np.float32)
    return {
        name: Windows(scaled[start:end], length, horizon, inputs, targets)
        for name, start, end in zip(SPLITS, starts, ends, strict=True)
    }


def boundaries(series: Series) -> tuple[int, int, int]:
    """Returns the rows where the splits end.

    Raises:
      ValueError: if a file with a name of ETT has fewer rows.
    """
    count, rate = len(series.values), PER_HOUR.get(series.name)
    if rate is None:
        train, test = int(SHARES[0] * count), int(SHARES[2] * count)
        return train, count - test, count
    ends = tuple(int(end) * MONTH * rate for end in np.cumsum(MONTHS))
    if count < ends[-1]:
        raise ValueError(
            f"{series.name} has {count} rows; its splits need {ends[-1]}, as in the official file"
        )
    return ends
