"""Speech Commands: one second of speech, one of 35 words, from the official archive unpacked into a folder."""

import hashlib
import os
import shlex
import wave
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.log_mel import HOP, log_mel
from experiments.data.sequences import Sequences

WORDS = [
    "backward",
    "bed",
    "bird",
    "cat",
    "dog",
    "down",
    "eight",
    "five",
    "follow",
    "forward",
    "four",
    "go",
    "happy",
    "house",
    "learn",
    "left",
    "marvin",
    "nine",
    "no",
    "off",
    "on",
    "one",
    "right",
    "seven",
    "sheila",
    "six",
    "stop",
    "three",
    "tree",
    "two",
    "up",
    "visual",
    "wow",
    "yes",
    "zero",
]
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
SAMPLES = RATE = 16_000
OFFSET = 2**15  # added to samples, which are stored without a sign
VERSION = 1


def load(official_dir: str | os.PathLike, *, data_dir: str | os.PathLike | None = None) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test", read on first use and cached: 16,000 samples plus `OFFSET` per clip.

    Shorter clips end with zeros, and longer ones are cut. The cache belongs to the names and sizes of the files and to both lists.

    Raises:
      FileNotFoundError: if a list, or the folder of a word, is missing.
      ValueError: if a list names a clip that is not there, a split is empty, or a file is no 16-bit mono recording at 16 kHz.
    """
    folder = cache.expand("official_dir", official_dir)
    missing = [name for name in (*LISTS.values(), *WORDS) if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"official_dir={str(folder)!r} lacks {', '.join(missing[:5])}; unpack speech_commands_v0.02.tar.gz and give its folder"
        )
    clips = [f"{word}/{path.name}" for word in WORDS for path in sorted((folder / word).glob("*.wav"))]
    splits = _split(folder, clips)
    digest = hashlib.sha256()
    for split, names in splits.items():
        digest.update(f"{split}\n".encode())
        for name in names:
            digest.update(f"{name} {(folder / name).stat().st_size}\n".encode())
    recipe = cache.Recipe(
        name="speech-commands",
        version=VERSION,
        parameters=dict(files_sha256=digest.hexdigest()),
        vocabulary=tuple(WORDS),
        rebuild=f"python -m experiments.data.prepare speech_commands --official_dir={shlex.quote(str(folder))}",
        token_dtype="uint16",
    )
    return cache.load_or_build(
        recipe,
        lambda: {split: _sequences(folder, names) for split, names in splits.items()},
        data_dir=data_dir,
    )


def _split(folder: Path, clips: list[str]) -> dict[str, list[str]]:
    known, listed = set(clips), {}
    for split, file in LISTS.items():
        names = (folder / file).read_text(encoding="utf-8").split("\n")
        for row, name in enumerate(names, start=1):
            if name and name not in known:
                raise ValueError(f"{folder / file}, row {row}: there is no clip {name!r}")
        listed[split] = list(dict.fromkeys(filter(None, names)))
    held_out = set().union(*listed.values())
    splits = {"train": [name for name in clips if name not in held_out]} | listed
    if empty := [split for split, names in splits.items() if not names]:
        raise ValueError(f"official_dir={str(folder)!r} leaves the split {empty[0]!r} without a clip")
    return splits


def _sequences(folder: Path, names: Iterable[str]) -> Sequences:
    names = list(names)
    clips = np.full((len(names), SAMPLES), OFFSET, np.uint16)
    for row, name in enumerate(names):
        samples = read(folder / name)[:SAMPLES]
        clips[row, : len(samples)] = samples.astype(np.int32) + OFFSET
    labels = [WORDS.index(name.partition("/")[0]) for name in names]
    return Sequences(clips.ravel(), np.arange(len(names) + 1) * SAMPLES, np.array(labels))


def read(path: Path) -> np.ndarray:
    """Returns the samples of a recording, int16 (n,).

    Raises:
      ValueError: if it is not 16-bit, mono and at 16 kHz, or cannot be read.
    """
    try:
        with wave.open(str(path), "rb") as file:
            form = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(f"{path} cannot be read as a WAV file: {error}") from None
    if form != (2, 1, RATE):
        raise ValueError(
            f"{path} has {8 * form[0]} bits, {form[1]} channels and {form[2]} Hz; expected 16 bits, 1 channel and {RATE} Hz"
        )
    return np.frombuffer(data[: len(data) // 2 * 2], "<i2")


class Clips:
    """Recordings of equal length, scaled: the source of pipelines.

    Attributes:
      stored: the samples plus `OFFSET`.
      mean, deviation: what is subtracted from the samples, and what they are divided by.
      stride: every stride-th sample is taken, without a filter.
      lengths: number of samples of each clip.
    """

    def __init__(self, stored: Sequences, *, mean: float, deviation: float, stride: int = 1):
        self.stored, self.mean, self.deviation, self.stride = stored, mean, deviation, stride
        self._clips = stored.tokens.reshape(len(stored), SAMPLES)
        self.lengths = np.full(len(stored), -(-SAMPLES // stride))

    def __len__(self) -> int:
        return len(self.stored)

    def gather(self, indices: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Returns the clips at `indices`: inputs float32 (b, t, 1) and labels int32 (b,).

        Raises:
          ValueError: if `width` is not the number of samples.
        """
        if width != self.lengths[0]:
            raise ValueError(f"clips of {self.lengths[0]} samples are not padded to {width}")
        samples = self._clips[indices, :: self.stride].astype(np.float32) - np.float32(OFFSET)
        scaled = (samples - np.float32(self.mean)) / np.float32(self.deviation)
        return {"inputs": scaled[..., None], "labels": self.stored.labels[indices]}


class Spectrograms:
    """Log-mel spectrograms of recordings, computed for each batch: the source of pipelines.

    Attributes:
      stored: the samples plus `OFFSET`.
      lengths: number of frames of each clip.
    """

    def __init__(self, stored: Sequences):
        self.stored = stored
        self._clips = stored.tokens.reshape(len(stored), SAMPLES)
        self.lengths = np.full(len(stored), SAMPLES // HOP)

    def __len__(self) -> int:
        return len(self.stored)

    def gather(self, indices: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Returns the clips at `indices`: inputs float32 (b, t, 80) and labels int32 (b,).

        Raises:
          ValueError: if `width` is not the number of frames.
        """
        if width != SAMPLES // HOP:
            raise ValueError(f"clips of {SAMPLES // HOP} frames are not padded to {width}")
        samples = (self._clips[indices].astype(np.float32) - OFFSET) / OFFSET
        return {"inputs": log_mel(samples), "labels": self.stored.labels[indices]}


def moments(stored: Sequences) -> tuple[float, float]:
    """Returns the mean and the deviation of all samples, from sums of integers."""
    count, total, squares = len(stored.tokens), 0, 0
    for start in range(0, count, 2**24):
        part = stored.tokens[start : start + 2**24].astype(np.int64) - OFFSET
        total, squares = total + int(part.sum()), squares + int((part * part).sum())
    mean = total / count
    return mean, (squares / count - mean * mean) ** 0.5
