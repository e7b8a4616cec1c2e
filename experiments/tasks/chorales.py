"""Chorales: the notes of the next frame, or the next event."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import chorales
from experiments.data.chorales import Events, Rolls
from experiments.tasks.task import Task
from experiments.tasks.tokens import cross_entropy
from layers.typing import Array, Float


class _Pieces(Task):
    """What both tasks share: their data, in the form of `source`."""

    source: ClassVar[type[Rolls] | type[Events]]
    padding = "end"
    packed = False
    selection_metric: ClassVar[tuple[str, str]] = ("loss", "min")
    splits: dict[str, Rolls | Events]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        official_file: str | None = None,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the pieces.

        Args:
          official_file: JSB_Chorales.mat; None for the chorales of the package music21, which must be installed (extra `music`).
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          ValueError: if music21 is not installed, or the file is malformed.
          CorruptCacheError: if the cached data set is damaged.
        """
        dataset = chorales.load(official_file, data_dir=data_dir)
        self.splits = {split: self.source(stored) for split, stored in dataset.splits.items()}
        self.manifest = dataset.manifest


class Chorales(_Pieces):
    """The notes of the next frame from the frames so far, each note by itself (Boulanger-Lewandowski et al. 2012, arXiv:1206.6392).

        loss = mean_t sum_n -log p(x_tn | x_1 ... x_{t-1}),   p = sigmoid(outputs)

    in nats per frame, over all frames of all pieces but the first of each. Published for JSB_Chorales.mat (Bai et al. 2018,
    arXiv:1803.01271), which nothing here was compared with: TCN 8.10, GRU 8.43, LSTM 8.45.

    Attributes:
      input_size, output_size: 88 notes.
      splits: "train", "validation" and "test": 229, 76 and 77 pieces of the file, or those of music21, a stand-in.
      manifest: manifest of the data set (see `data.cache`).
    """

    input_size = output_size = chorales.NOTES
    causal: ClassVar[bool] = True
    source = Rolls

    def loss(
        self, outputs: Float[Array, "b t n"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss per frame and the sums {"loss", "count"} over frames."""
        labels = batch["labels"]
        counted = ~jnp.isnan(labels) & (batch["weight"] > 0)[:, None, None]
        labels, outputs = (jnp.where(counted, x.astype(jnp.float32), 0.0) for x in (labels, outputs))
        losses = jnp.where(counted, optax.sigmoid_binary_cross_entropy(outputs, labels), 0.0)
        sums = {"loss": jnp.sum(losses), "count": jnp.sum(counted[..., 0]).astype(jnp.float32)}
        return sums["loss"] / jnp.maximum(sums["count"], 1.0), sums

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the loss of each note's frequency in training, "frequencies", and of that after the same note, "transitions"."""
        train, tested = (_pairs(self.splits[name]) for name in ("train", split))
        before, after = train
        often = (after.sum(0) + 1) / (len(after) + 2)
        # The frequency of a note by whether it sounds, (2, 88).
        moves = [((after & state).sum(0) + 1) / (state.sum(0) + 2) for state in (~before, before)]
        found = {"frequencies": often[None], "transitions": np.where(tested[0], moves[1], moves[0])}
        return {name: _loss(chance, tested[1]) for name, chance in found.items()}


def _pairs(source: Rolls) -> tuple[np.ndarray, np.ndarray]:
    """All frames of a split but the last of each piece, and those that follow them, bool (n, 88)."""
    return (
        np.concatenate([roll[:-1] for roll in source.rolls]),
        np.concatenate([roll[1:] for roll in source.rolls]),
    )


def _loss(chance: np.ndarray, frames: np.ndarray) -> float:
    return float(-np.log(np.where(frames, chance, 1 - chance)).sum(1).mean())


class ChoraleEvents(_Pieces):
    """The next event of a chorale: a note of the frame, lowest first, or the end of the frame, by a language model.

    The loss is the cross-entropy in nats per event. A frame of n notes has n + 1 events, and the sum of their losses is -log p of the
    frame, whose notes `Chorales` takes for independent of each other.

    Attributes:
      vocab_size: 88 notes and the end of a frame.
      splits, manifest: those of `Chorales`.
    """

    vocab_size = len(chorales.VOCABULARY)
    unprojected: ClassVar[bool] = True
    source = Events

    def loss(
        self, outputs: Any, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and sums over events (see `tokens.cross_entropy`)."""
        return cross_entropy(outputs, batch)

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the cross-entropy of the frequencies of events in training, "unigram"."""
        counts = [self._events(name) for name in ("train", split)]
        often = (counts[0] + 1) / (counts[0] + 1).sum()
        return {"unigram": float(-(counts[1] * np.log(often)).sum() / counts[1].sum())}

    def _events(self, split: str) -> np.ndarray:
        """How often each event is a label of a split."""
        source = self.splits[split]
        batch = source.gather(np.arange(len(source)), int(source.lengths.max()))
        return np.bincount(batch["labels"][batch["labels"] >= 0], minlength=self.vocab_size)
