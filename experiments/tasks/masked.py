"""Masked language modelling, and what its tasks share: the hidden tokens of a row, predicted from the others."""

import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.masking import Masked, Masking
from experiments.data.pipeline import IGNORE, Source
from experiments.data.text.datasets import load_corpus
from experiments.data.text.rows import RowOptions
from experiments.data.text.tokenizers import Bytes, Tokenizer
from experiments.tasks import tokens
from experiments.tasks.task import Task
from layers.kernels.segments import Padding
from layers.options import check_integer
from layers.typing import Array, Float
from seqmodels.replaced_token_detector import ReplacedTokens

LARGEST_TABLE = 512  # tokens of a vocabulary whose pairs are counted


class MaskedTask(Task):
    """The base class of tasks whose labels are hidden tokens of a row.

    Attributes:
      splits: the splits, of `data.masking.Masked` rows.
      vocab_size: number of tokens with the mask, which is the last.
    """

    masks: ClassVar[bool] = True
    selection_metric: ClassVar[tuple[str, str]] = ("loss", "min")
    splits: Mapping[str, Masked]
    manifest: Mapping[str, Any]

    def hidden(self, splits: Mapping[str, Source], masking: Masking) -> dict[str, Masked]:
        """Returns the splits with hidden tokens."""
        return {name: Masked(rows, masking, mask=self.vocab_size - 1) for name, rows in splits.items()}

    def loss(
        self, outputs: Float[Array, "b t v"] | ReplacedTokens, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss of the hidden tokens in nats, and the sums of `tokens.cross_entropy`.

        For a `ReplacedTokenDetector` the loss is that of its generator and `weight` times that of its discriminator, and there
        are the sums of `detection` besides.
        """
        if not isinstance(outputs, ReplacedTokens):
            return tokens.cross_entropy(outputs, batch)
        _, sums = tokens.cross_entropy(outputs.logits, batch)
        found = detection(outputs, batch)
        share = found["detection_loss"] / jnp.maximum(found["detection_loss_count"], 1.0)
        sums |= {
            "generator_loss": sums["loss"],
            "loss": sums["loss"] + outputs.weight * share * sums["count"],
        }
        return sums["loss"] / jnp.maximum(sums["count"], 1.0), sums | found

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the losses and accuracies of the frequencies of tokens in training and, of few tokens, of the neighbours too.

        "neighbours" takes p(x | l, r) proportional to p(x) p(l | x) p(r | x), with the tokens l and r on both sides, as far as they
        are to be seen. One is added to each count.
        """
        mask, tables = self.vocab_size - 1, None
        if mask <= LARGEST_TABLE:
            pairs = self._pairs + 1.0
            # log p(l | x) and log p(r | x), by l or r and x.
            tables = [np.log(table / table.sum(0)) for table in (pairs[:, :-1], pairs[:-1].T)]
        counts = self._tokens + 1.0
        prior = np.log(counts / counts.sum())
        source, found = self.splits[split], {"unigram": [], "neighbours": []}
        for start in range(0, len(source), 256):
            rows = np.arange(start, min(start + 256, len(source)))
            batch = source.gather(rows, source.widths[0])
            at = np.nonzero(batch["labels"] != IGNORE)
            asked = batch["labels"][at]
            found["unigram"].append((asked, np.broadcast_to(prior, (len(asked), mask))))
            if tables is not None:
                scores = prior + sum(
                    np.where((seen := _beside(batch, at, step, mask))[:, None] >= 0, table[seen], 0.0)
                    for table, step in zip(tables, (-1, 1), strict=True)
                )
                found["neighbours"].append((asked, scores - np.logaddexp.reduce(scores, 1, keepdims=True)))
        return {
            name: value
            for predictor, parts in found.items()
            if parts
            for name, value in _scores(predictor, parts).items()
        }

    @functools.cached_property
    def _pairs(self) -> np.ndarray:
        return self.splits["train"].pair_counts()

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        return self.splits["train"].token_counts()


def _beside(batch: Mapping[str, np.ndarray], at: tuple[np.ndarray, np.ndarray], step: int, mask: int):
    """Returns the token beside each place, the number of the mask at the edge of a segment, and -1 if it is hidden."""
    ids = batch.get("segment_ids", np.ones(batch["inputs"].shape, np.int32))
    row, place = at
    inside = (place + step >= 0) & (place + step < ids.shape[1])
    beside = np.clip(place + step, 0, ids.shape[1] - 1)
    inside &= ids[row, beside] == ids[row, place]
    shown = np.where(batch["labels"][row, beside] == IGNORE, batch["inputs"][row, beside], -1)
    return np.where(inside, shown, mask)


def _scores(name: str, parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    logs = np.concatenate([table[np.arange(len(asked)), asked] for asked, table in parts])
    right = np.concatenate([table.argmax(1) == asked for asked, table in parts])
    return {f"{name}_loss": float(-logs.mean()), f"{name}_accuracy": float(right.mean())}


def detection(outputs: ReplacedTokens, batch: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
    """Returns the sums of the discriminator over real tokens, each with its count.

    "detection_loss" is the binary cross-entropy in nats, "detection_accuracy" the tokens it tells right, "found" the replaced
    tokens among these, and "replaced" all of them.
    """
    real = jnp.broadcast_to((batch["weight"] > 0)[:, None], outputs.scores.shape)
    if "segment_ids" in batch:
        real &= batch["segment_ids"] != 0
    replaced, scores = outputs.replaced, jnp.where(real, outputs.scores.astype(jnp.float32), 0.0)
    losses = jax.nn.softplus(scores) - jnp.where(replaced, scores, 0.0)
    right, count = (scores > 0) == replaced, jnp.sum(real)
    sums = {
        "detection_loss": (jnp.sum(losses, where=real), count),
        "detection_accuracy": (jnp.sum(right & real), count),
        "found": (jnp.sum(right & replaced & real), jnp.sum(replaced & real)),
        "replaced": (jnp.sum(replaced & real), count),
    }
    return {
        key: value.astype(jnp.float32)
        for name, pair in sums.items()
        for key, value in zip((name, f"{name}_count"), pair, strict=True)
    }


class MaskedLanguageModeling(MaskedTask):
    """The hidden tokens of a corpus, by default the sources of Python's standard library (BERT, arXiv:1810.04805).

    Attributes:
      tokenizer: the map between text and token ids; the mask follows its ids.
      packed: largest number of segments of a row, or False if documents see each other.
    """

    padding: ClassVar[Padding] = "end"
    tokenizer: Tokenizer

    def __init__(
        self,
        *,
        source: str | os.PathLike = "stdlib",
        tokenizer: str | os.PathLike = "bytes",
        length: int = 256,
        packing: str = "best_fit",
        reset: bool = True,
        mask_rate: float = 0.15,
        masked: float = 0.8,
        random: float = 0.1,
        mask_seed: int = 0,
        invalid: str = "error",
        official_dir: str | os.PathLike | None = None,
        train: int | None = None,
        validation: int | None = None,
        test: int | None = None,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the documents, which are tokenised on first use.

        Args:
          source, tokenizer, length, packing, reset, invalid, official_dir, train, validation, test, data_dir: see the task
            `language`; "decompose" is for training of language models alone.
          mask_rate, masked, random, mask_seed: see `data.masking.Masking`.

        Raises:
          ValueError: if a value is invalid, the source cannot be read or leaves a split empty, or a library is not installed.
          CorruptCacheError: if the cached data set is damaged.
        """
        most = dict(train=train, validation=validation, test=test)
        for name, value in most.items():
            if value is not None:
                check_integer(f"task.{name}", value, least=1)
        if packing == "decompose":
            raise ValueError(
                "packing='decompose' is for the task 'language'; expected best_fit or concatenate"
            )
        rows = RowOptions(length=length, packing=packing, reset=reset)
        masking = Masking(mask_rate=mask_rate, masked=masked, random=random, mask_seed=mask_seed)
        corpus = load_corpus(
            source, tokenizer=tokenizer, invalid=invalid, official_dir=official_dir, data_dir=data_dir
        )
        self.tokenizer = corpus.tokenizer
        self.vocab_size = self.tokenizer.vocab_size + 1
        packed = {
            split: rows.evaluated(documents, self.tokenizer.end, most[split])
            for split, documents in corpus.dataset.splits.items()
        }
        self.splits = self.hidden(packed, masking)
        self.packed = max(split.segments for split in packed.values()) if reset else False
        made = dict(rows=rows.manifest() | dict(most=most), masking=dict(vars(masking)))
        self.manifest = corpus.dataset.manifest | made

    @staticmethod
    def sizes(*, tokenizer: str | os.PathLike = "bytes", **_: Any) -> dict[str, int]:
        """Returns the number of tokens if they are bytes; that of other tokenizers depends on the text."""
        return {"vocab_size": Bytes.vocab_size + 1} if tokenizer == "bytes" else {}
