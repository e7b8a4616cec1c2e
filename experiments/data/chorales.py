"""Chorales as frames of notes: the file JSB_Chorales.mat, or Bach's chorales in the package music21.

A piece is stored as events: per frame, a quarter note long, the notes that sound, lowest first, and then `NEXT`. Notes are those
of a piano, 0 to 87, for pitches 21 to 108 of MIDI.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.io

from experiments.data import cache
from experiments.data.sequences import Sequences

NOTES, LOWEST = 88, 21
NEXT = NOTES  # the event that ends a frame
VOCABULARY = (*(str(LOWEST + note) for note in range(NOTES)), "next")
PARTS = {"train": "traindata", "validation": "validdata", "test": "testdata"}  # of the file
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}  # of music21's, as in the file
VERSION = 1


def load(
    official_file: str | os.PathLike | None = None, *, data_dir: str | os.PathLike | None = None
) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test", read on first use and cached; a sequence is the events of a piece.

    Args:
      official_file: JSB_Chorales.mat; None for the chorales of music21, a stand-in with splits of its own.

    Raises:
      ValueError: if the file is not one of piano rolls, or music21 is not installed.
    """
    if official_file is None:
        if importlib.util.find_spec("music21") is None:
            raise ValueError(
                "task.official_file is not given, and the stand-in is in the package music21, which is not installed; install "
                "the extra music (pip install music21), or pass JSB_Chorales.mat"
            )
        parameters, given = {"music21": importlib.metadata.version("music21")}, ""
    else:
        path = cache.expand("official_file", official_file)
        if not path.is_file():
            raise ValueError(
                f"task.official_file={str(official_file)!r} is no file; expected JSB_Chorales.mat"
            )
        parameters = {"file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        given = f" --official_file={shlex.quote(str(path))}"

    def build() -> dict[str, Sequences]:
        pieces = read_music21() if official_file is None else read_rolls(path)
        return {split: _sequences(rolls) for split, rolls in pieces.items()}

    recipe = cache.Recipe(
        name="chorales" if official_file is None else "jsb-chorales",
        version=VERSION,
        parameters=parameters,
        vocabulary=VOCABULARY,
        rebuild=f"python -m experiments.data.prepare chorales{given}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def read_rolls(path: Path) -> dict[str, list[np.ndarray]]:
    """Returns the piano rolls of a file of MATLAB by split, bool (t, 88) per piece.

    Raises:
      ValueError: if the file is none, lacks a split, or a piece is no roll of at least two frames; names the piece.
    """
    try:
        content = scipy.io.loadmat(path)
    except Exception as error:  # noqa: BLE001 - damage lets SciPy's reader raise anything, such as UnboundLocalError
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} cannot be read as a file of MATLAB ({reason}); expected JSB_Chorales.mat, of version 5"
        ) from None
    if missing := [name for name in PARTS.values() if name not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; expected {', '.join(PARTS.values())}")
    pieces = {}
    for split, name in PARTS.items():
        rolls = [np.asarray(roll) for roll in content[name].ravel()]
        for number, roll in enumerate(rolls, start=1):
            if roll.ndim != 2 or roll.shape[1] != NOTES or len(roll) < 2 or not np.isin(roll, (0, 1)).all():
                raise ValueError(
                    f"{path}: piece {number} of {name} has shape {roll.shape}; expected frames of {NOTES} zeros and ones, two or more"
                )
        if not rolls:
            raise ValueError(f"{path}: {name} has no piece")
        pieces[split] = [roll.astype(bool) for roll in rolls]
    return pieces


def read_music21() -> dict[str, list[np.ndarray]]:
    """Returns the piano rolls of music21's chorales by split, which the hash of a chorale's name chooses."""
    from music21 import corpus

    pieces: dict[str, list[np.ndarray]] = {split: [] for split in PARTS}
    for name in sorted(set(corpus.chorales.Iterator(returnType="filename"))):
        notes = [
            (float(found.offset), float(found.quarterLength), pitch.midi)
            for found in corpus.parse(name).flatten().notes
            for pitch in found.pitches
        ]
        pieces[_split_of(name)].append(roll_of(notes))
    return pieces


def roll_of(notes: Iterable[tuple[float, float, int]]) -> np.ndarray:
    """Returns the frames of a piece, bool (t, 88): the notes that sound at each quarter.

    Args:
      notes: start and length in quarters, and pitch of MIDI, of each note.
    """
    notes = list(notes)
    frames = max(int(np.ceil(start + length)) for start, length, _ in notes)
    roll = np.zeros((frames, NOTES), bool)
    for start, length, pitch in notes:
        roll[int(np.ceil(start)) : int(np.ceil(start + length)), pitch - LOWEST] = True
    return roll


def _split_of(name: str) -> str:
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    bounds = np.cumsum(list(SHARES.values()))
    return list(SHARES)[int(np.searchsorted(bounds, place, side="right"))]


def events_of(roll: np.ndarray) -> np.ndarray:
    """Returns the events of a piece, uint8: the notes of each frame and `NEXT`."""
    return np.nonzero(np.pad(roll, ((0, 0), (0, 1)), constant_values=True))[1].astype(np.uint8)


def rolls_of(events: np.ndarray) -> np.ndarray:
    """Returns the frames of a piece, bool (t, 88), from its events; the inverse of `events_of`."""
    ends = events == NEXT
    frames = np.cumsum(ends) - ends
    roll = np.zeros((int(ends.sum()), NOTES), bool)
    roll[frames[~ends], events[~ends]] = True
    return roll


def _sequences(rolls: Sequence[np.ndarray]) -> Sequences:
    events = [events_of(roll) for roll in rolls]
    offsets = np.cumsum([0, *map(len, events)])
    return Sequences(np.concatenate(events), offsets, np.zeros(len(events), np.int32))


class Rolls:
    """Frames of pieces, each with the one that follows it as its label. The source of pipelines.

    Attributes:
      rolls: bool (t, 88) per piece.
      lengths: number of frames that are read of each piece, all but the last.
    """

    def __init__(self, stored: Sequences):
        self.rolls = [rolls_of(stored[number][0]) for number in range(len(stored))]
        self.lengths = np.array([len(roll) - 1 for roll in self.rolls])

    def __len__(self) -> int:
        return len(self.rolls)

    def gather(self, indices: np.ndarray, width: int) -> Mapping[str, np.ndarray]:
        """Returns inputs and labels (b, t, 88), float32, and segment_ids (b, t); labels of padding are NaN.

        Raises:
          ValueError: if a piece is longer than `width`.
        """
        lengths = self.lengths[indices]
        if lengths.max() > width:
            raise ValueError(f"a piece of {lengths.max()} frames does not fit into a width of {width}")
        inputs = np.zeros((len(lengths), width, NOTES), np.float32)
        labels = np.full(inputs.shape, np.nan, np.float32)
        for row, number in enumerate(np.asarray(indices).tolist()):
            roll = self.rolls[number]
            inputs[row, : len(roll) - 1], labels[row, : len(roll) - 1] = roll[:-1], roll[1:]
        segment_ids = (np.arange(width) < lengths[:, None]).astype(np.int32)
        return {"inputs": inputs, "labels": labels, "segment_ids": segment_ids}


class Events:
    """Events of pieces, each with the one that follows it as its label. The source of pipelines.

    Attributes:
      lengths: number of events that are read of each piece, all but the last.
    """

    def __init__(self, stored: Sequences):
        self._stored = stored
        self.lengths = stored.lengths - 1

    def __len__(self) -> int:
        return len(self._stored)

    def gather(self, indices: np.ndarray, width: int) -> Mapping[str, np.ndarray]:
        """Returns inputs, labels and segment_ids (b, t), int32; labels of padding are -1.

        Raises:
          ValueError: if a piece is longer than `width`.
        """
        batch = self._stored.gather(indices, width + 1)
        real = batch["segment_ids"][:, 1:] > 0
        events = batch["inputs"]
        return {
            "inputs": np.where(real, events[:, :-1], 0),
            "labels": np.where(real, events[:, 1:], -1),
            "segment_ids": real.astype(np.int32),
        }
