"""Language modelling: predict the next token of text, measured in bits per byte."""

import functools
import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from experiments.data.text.datasets import load_corpus
from experiments.data.text.decomposition import Decomposed
from experiments.data.text.packing import Packed
from experiments.data.text.pieces import Pieces
from experiments.data.text.rows import RowOptions
from experiments.data.text.stages import Staged
from experiments.data.text.tokenizers import Bytes, Tokenizer
from experiments.tasks import tokens
from experiments.tasks.task import Task
from layers.cross_entropy import Unprojected
from layers.kernels.segments import Padding
from layers.options import check_integer, check_number
from layers.typing import Array, Float

LN2 = math.log(2)


class LanguageModeling(Task):
    """Next-token prediction on the documents of a corpus, by default the sources of Python's standard library.

    Attributes:
      tokenizer: the map between text and token ids.
      vocab_size: number of tokens of the tokenizer, the end of a document included, and of tags of `knots`, which follow them.
      splits: splits "train", "validation" and "test", of different documents.
      manifest: manifest of the data set (see `data.cache`) with the options of the rows.
      packed: largest number of segments of a row, or False if documents see each other.
    """

    padding: ClassVar[Padding] = "end"
    unprojected: ClassVar[bool] = True
    selection_metric: ClassVar[tuple[str, str]] = ("bits_per_byte", "min")
    tokenizer: Tokenizer
    splits: dict[str, Packed | Staged | Pieces]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        source: str | os.PathLike = "stdlib",
        tokenizer: str | os.PathLike = "bytes",
        length: int = 256,
        packing: str = "best_fit",
        reset: bool = True,
        stages: tuple[tuple[int, int], ...] = (),
        order: str = "given",
        shortest: int | None = None,
        curriculum: str | None = None,
        cycles: int | None = None,
        knots: int = 0,
        extent: int | None = None,
        pieces: int | None = None,
        invalid: str = "error",
        official_dir: str | os.PathLike | None = None,
        z_loss: float = 0.0,
        train: int | None = None,
        validation: int | None = None,
        test: int | None = None,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the documents, which are tokenised on first use.

        Args:
          source: "stdlib", the sources of the running Python's standard library; or the path of a text file, a file of
            JSON lines or parquet with texts named "text", or a folder with such files (see `data.text.sources`); or "enwik8",
            "text8", "wikitext103", "rfc" (see `data.text.official`) or "tfds:NAME" (see `data.text.tensorflow_datasets`); or the
            folder of a data set that is prepared (see `data.text.prepared`).
          tokenizer: "bytes", "characters", "bpe:VOCAB", or the path of a tokenizer.json (see `data.text.tokenizers`).
          length: number of tokens of a row.
          packing: "best_fit", which cuts only documents that are longer than a row, "concatenate" (see
            `data.text.packing`), or "decompose", rows of single documents by powers of two (see `data.text.decomposition`).
          reset: whether documents of a row are kept apart; False needs "concatenate".
          stages, order, shortest, curriculum, cycles, knots, extent, pieces: options of training (see `data.text.rows.RowOptions`).
          invalid: what to do with bytes that are not UTF-8: "error" or "replace".
          official_dir: the archive or folder of a published corpus, or the folder in which tensorflow-datasets prepared it.
          z_loss: weight of the z-loss (see `tasks.tokens.cross_entropy`), in training and evaluation; 1e-4 is usual.
          train: largest number of rows in that split, evenly spaced; None keeps all. Likewise `validation` and `test`.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          ValueError: if a value is invalid, the source cannot be read or leaves a split empty, or a library is not installed.
          CorruptCacheError: if the cached data set is damaged.
        """
        most = dict(train=train, validation=validation, test=test)
        for name, value in most.items():
            if value is not None:
                check_integer(f"task.{name}", value, least=1)
        rows = RowOptions(
            length=length,
            packing=packing,
            reset=reset,
            stages=tuple(stages),
            order=order,
            shortest=shortest,
            curriculum=curriculum,
            cycles=cycles,
            knots=knots,
            extent=extent,
            pieces=pieces,
        )
        check_number("task.z_loss", z_loss, least=0.0)
        self._z_loss = float(z_loss)
        corpus = load_corpus(
            source, tokenizer=tokenizer, invalid=invalid, official_dir=official_dir, data_dir=data_dir
        )
        self.tokenizer = corpus.tokenizer
        end, first_tag = self.tokenizer.end, self.tokenizer.vocab_size
        self.vocab_size = first_tag + knots
        self.splits = {
            split: rows.trained(documents, end, most[split], first_tag)
            if split == "train"
            else rows.evaluated(documents, end, most[split])
            for split, documents in corpus.dataset.splits.items()
        }
        self.packed = max(split.segments for split in self.splits.values()) if reset else False
        self.manifest = corpus.dataset.manifest | {"rows": rows.manifest() | dict(most=most)}
        if isinstance(train_rows := self.splits["train"], Decomposed):
            self.manifest["rows"]["decomposed"] = train_rows.summary()

    @staticmethod
    def sizes(*, tokenizer: str | os.PathLike = "bytes", knots: int = 0, **_: Any) -> dict[str, int]:
        """Returns the number of tokens if they are bytes; that of other tokenizers depends on the text."""
        return {"vocab_size": Bytes.vocab_size + knots} if tokenizer == "bytes" else {}

    def loss(
        self, outputs: Float[Array, "b t v"] | Unprojected, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss over tokens in nats and the sums of `tokens.cross_entropy` and of "bits_per_byte".

        The bits of all predicted tokens, ends of documents included, are divided by the number of bytes of text that
        the tokens stand for.
        """
        loss, sums = tokens.cross_entropy(outputs, batch, z_loss=self._z_loss)
        counted = tokens.is_counted(batch)
        sizes = jnp.asarray(self.tokenizer.bytes_per_token, jnp.float32)
        text_bytes = jnp.sum(sizes[jnp.where(counted, batch["labels"], 0)], where=counted)
        bits = sums.get("cross_entropy", sums["loss"]) / LN2
        return loss, sums | {"bits_per_byte": bits, "bits_per_byte_count": text_bytes}

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the bits per byte of the token frequencies of "train", with one added to each count."""
        frequencies = self._train_counts + 1.0
        bits = -np.log2(frequencies / frequencies.sum())
        counts = self.splits[split].label_counts(self.vocab_size)
        text_bytes = counts @ self.tokenizer.bytes_per_token
        return {"unigram_bits_per_byte": float(counts @ bits / max(text_bytes, 1))}

    @functools.cached_property
    def _train_counts(self) -> np.ndarray:
        return self.splits["train"].label_counts(self.vocab_size)
