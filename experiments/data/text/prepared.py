"""Corpora that are prepared: the tokens without the text, for a machine on which the text is not.

`python -m experiments.data.prepare text` writes a folder text-vVERSION-HASH and, for a byte-pair encoding, a tokenizer bpe-*.json beside
it. Both can be copied to another machine, where the folder is the source. The run is the same as with the text.
"""

import json
import os
from pathlib import Path

from experiments.data import cache
from experiments.data.text.nucleotides import word_of
from experiments.data.text.tokenizers import BytePairs, Tokenizer, make_tokenizer

NAME, VERSION = "text", 1  # increment VERSION when equal documents and tokenizers make other tokens


def is_prepared(source: str | os.PathLike) -> bool:
    """Returns whether a source is the folder of a data set."""
    folder = cache.expand("source", source)
    return (folder / cache.MANIFEST).is_file() and any(folder.glob("*.array_record"))


def load_prepared(
    source: str | os.PathLike, *, tokenizer: str | os.PathLike
) -> tuple[cache.Dataset, Tokenizer]:
    """Returns the data set in a folder, and its tokenizer.

    Args:
      tokenizer: "bytes", "bpe:VOCAB", whose file is searched for beside the folder, or the path of the tokenizer.json that made
        the tokens.

    Raises:
      ValueError: the folder is that of another kind of data set, or made with another tokenizer, or the tokenizer's file is missing.
      CorruptCacheError: the data set is damaged.
    """
    folder = cache.expand("source", source).absolute()
    try:
        manifest = json.loads((folder / cache.MANIFEST).read_bytes())
        made_with = dict(manifest["parameters"]["tokenizer"])
        recipe = cache.Recipe(
            name=NAME,
            version=VERSION,
            parameters=manifest["parameters"],
            vocabulary=(),
            rebuild="",
            token_dtype=manifest["token_dtype"],
        )
        kind, size, sha256 = (made_with[key] for key in ("name", "vocab_size", "sha256"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"source={os.fspath(source)!r} is no corpus that `experiments.data.prepare text` made ({type(error).__name__}: {error})"
        ) from None
    maker = _tokenizer(folder, os.fspath(tokenizer), kind, size, sha256)
    if maker.manifest != made_with:
        raise ValueError(
            f"tokenizer={os.fspath(tokenizer)!r} is not the one that made the tokens in {folder.name}, {kind} with {size} ids "
            f"(SHA-256 {sha256[:12]})"
        )
    remedy = "Copy the folder again from the machine that prepared the corpus"
    return cache.load(recipe, folder, remedy=remedy), maker


def _tokenizer(folder: Path, given: str, kind: str, size: int, sha256: str) -> Tokenizer:
    if given == "bytes" or word_of(given) is not None:
        return make_tokenizer(given, texts=list)
    trained = kind == "bpe" and given.startswith("bpe:")
    if not trained and not given.endswith(".json"):
        expected = {"bytes": "bytes", "bpe": f"bpe:{size}, or the path of its tokenizer.json"}
        if word_of(kind) is not None:
            expected[kind] = kind
        raise ValueError(
            f"tokenizer={given!r} with the prepared corpus {folder.name}; expected "
            + expected.get(kind, f"the text itself as the source, as a folder holds no vocabulary of {kind}")
        )
    if given.endswith(".json"):
        return make_tokenizer(given, texts=list)
    # A small text may give fewer tokens than were asked for.
    name = f"bpe-{given.removeprefix('bpe:')}-*-{sha256[:12]}.json"
    file = next(iter(sorted(folder.parent.glob(name))), None)
    if file is None:
        raise ValueError(
            f"tokenizer={given!r}: no file {name} beside the prepared corpus {folder}; copy it from the machine that prepared "
            "the corpus, or give its path"
        )
    return BytePairs(file.read_text(encoding="utf-8"), origin=str(file))
