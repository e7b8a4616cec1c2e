"""Corpora of tokens: read, tokenised once and cached."""

import dataclasses
import itertools
import os
import shlex
from collections.abc import Sequence

import numpy as np

from experiments.data import cache
from experiments.data.sequences import Sequences
from experiments.data.text.documents import corpus_sha256
from experiments.data.text.prepared import NAME, VERSION, is_prepared, load_prepared
from experiments.data.text.sources import read_documents
from experiments.data.text.tokenizers import Tokenizer, make_tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set of documents, whose labels are their numbers of bytes, and the tokenizer."""

    dataset: cache.Dataset
    tokenizer: Tokenizer


def load_corpus(
    source: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike = "bytes",
    invalid: str = "error",
    official_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
) -> Corpus:
    """Returns the tokens of a source, which is read every time and tokenised if its content is new.

    The parameters in the manifest hold the hash of all documents, so that another corpus is another data set.

    Args:
      source: "stdlib", a path or a published corpus; see `sources.read_documents`, also for `invalid` and `official_dir`. The folder
        of a prepared data set is taken as it is (see `prepared`).
      tokenizer: name or path; see `tokenizers.make_tokenizer`.
      data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

    Raises:
      ValueError: if the source or the tokenizer is refused.
      CorruptCacheError: if the cached data set is damaged.
    """
    if official_dir is None and is_prepared(source):
        return Corpus(*load_prepared(source, tokenizer=tokenizer))
    documents = read_documents(source, invalid=invalid, official_dir=official_dir)
    maker = make_tokenizer(tokenizer, texts=lambda: documents["train"], data_dir=data_dir)
    largest = maker.vocab_size - (2 if maker.end == maker.vocab_size - 1 else 1)  # ends are not stored
    options = dict(source=source, tokenizer=tokenizer, invalid=invalid)
    if official_dir is not None:
        options["official_dir"] = official_dir
    recipe = cache.Recipe(
        name=NAME,
        version=VERSION,
        parameters={"corpus_sha256": corpus_sha256(documents), "tokenizer": maker.manifest},
        vocabulary=(),
        rebuild="python -m experiments.data.prepare text "
        + " ".join(f"--{name}={shlex.quote(os.fspath(value))}" for name, value in options.items()),
        token_dtype="uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "int32",
    )
    dataset = cache.load_or_build(
        recipe,
        lambda: {split: _tokenised(texts, maker, recipe.token_dtype) for split, texts in documents.items()},
        data_dir=data_dir,
    )
    return Corpus(dataset, maker)


def _tokenised(texts: Sequence[str], tokenizer: Tokenizer, dtype: str) -> Sequences:
    parts = [tokens.astype(dtype) for tokens in tokenizer.encode_all(texts)]
    offsets = [0, *itertools.accumulate(map(len, parts))]
    return Sequences(
        np.concatenate(parts), np.array(offsets), np.array([len(text.encode()) for text in texts])
    )
