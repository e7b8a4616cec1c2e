"""ListOps data sets, cached: generated from a seed, or read from Long Range Arena's own files."""

import dataclasses
import hashlib
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from experiments.data import cache, listops
from experiments.data.listops import ListOpsConfig
from experiments.data.progress import progress
from experiments.data.sequences import Sequences

OFFICIAL_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
OFFICIAL_HEADER = "Source\tTarget"
REMOVE_PARENTHESES = str.maketrans("", "", "()")


def load_generated(
    config: ListOpsConfig, *, data_dir: str | os.PathLike | None = None, workers: int | None = None
) -> cache.Dataset:
    """Returns the data set that `config` describes, generated on first use and cached (see `cache.load_or_build`)."""

    def build() -> dict[str, Sequences]:
        with progress("Generating ListOps", config.total, "sequences") as bar:
            splits = listops.generate(config, workers=workers, report=bar.update)
        return {split: Sequences.from_records(records) for split, records in splits.items()}

    parameters = dataclasses.asdict(config)
    options = " ".join(f"--{name}={value}" for name, value in parameters.items())
    recipe = cache.Recipe(
        name="listops",
        version=listops.VERSION,
        parameters=parameters,
        vocabulary=listops.VOCABULARY,
        rebuild=f"python -m experiments.data.prepare listops {options}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def load_official(
    official_dir: str | os.PathLike, *, data_dir: str | os.PathLike | None = None
) -> cache.Dataset:
    """Returns the data set of Long Range Arena's files with our token ids, parsed on first use and cached.

    Args:
      official_dir: folder with basic_train.tsv, basic_val.tsv and basic_test.tsv (`listops-1000` of the release).

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if a file is not a header `Source<tab>Target` followed by expressions and their values, digits; names
        file and line.
    """
    folder = cache.expand("official_dir", official_dir)
    paths = {split: folder / name for split, name in OFFICIAL_FILES.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"official_dir={str(folder)!r} lacks {', '.join(missing)}; unpack the ListOps files of the Long Range Arena "
            "release there, or leave official_dir out to generate the data"
        )

    def build() -> dict[str, Sequences]:
        return {split: Sequences.from_records(_read_official(path)) for split, path in paths.items()}

    recipe = cache.Recipe(
        name="listops-official",
        version=listops.VERSION,
        parameters={path.name: _sha256(path) for path in paths.values()},
        vocabulary=listops.VOCABULARY,
        rebuild=f"python -m experiments.data.prepare listops --official_dir={shlex.quote(str(folder))}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def majority_accuracy(train: Sequences, test: Sequences) -> float:
    """Returns the accuracy on `test` of the most frequent label of `train`."""
    return float(np.mean(test.labels == np.bincount(train.labels).argmax()))


def root_operator_accuracy(train: Sequences, test: Sequences) -> float:
    """Returns the accuracy on `test` of the most frequent label in `train` among sequences with the same first token.

    It is 36.8% on Long Range Arena's ListOps: a model with this score has learned nothing of the nested structure.
    """
    counts = np.zeros((len(listops.VOCABULARY), listops.NUM_CLASSES), np.int64)
    np.add.at(counts, (_first_tokens(train), train.labels), 1)
    return float(np.mean(counts.argmax(axis=1)[_first_tokens(test)] == test.labels))


def split_baselines(splits: Mapping[str, Sequences], split: str = "test") -> dict[str, float]:
    """Returns the accuracies on `split` of the two predictors above, fitted on "train"."""
    train, test = splits["train"], splits[split]
    return {"majority": majority_accuracy(train, test), "root_operator": root_operator_accuracy(train, test)}


def _first_tokens(sequences: Sequences) -> np.ndarray:
    return sequences.tokens[sequences.offsets[:-1]]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_official(path: Path) -> Iterator[listops.Record]:
    # As bytes, so that one that is no UTF-8 is found in its line.
    with path.open("rb") as file, progress(f"Reading {path.name}", None, "lines") as bar:
        number = 1
        try:
            if (header := _text(file.readline())) != OFFICIAL_HEADER:
                raise ValueError(f"the header must be {OFFICIAL_HEADER!r}, got {header[:80]!r}")
            for line in file:
                number += 1
                yield _parse_official(_text(line))
                bar.update(1)
            if number == 1:
                number = 2
                raise ValueError("no expression follows the header")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ValueError(f"byte {error.start + 1} of the line, {byte:#04x}, is no UTF-8 text") from None


def _parse_official(line: str) -> listops.Record:
    source, *targets = line.split("\t")
    if len(targets) != 1 or targets[0] not in tuple("0123456789"):
        raise ValueError(f"expected an expression, a tab and a digit, got {line[-40:]!r}")
    tokens = listops.encode(source.translate(REMOVE_PARENTHESES))
    label, value = int(targets[0]), listops.evaluate(tokens)
    if source.count("(") != source.count(")"):
        raise ValueError(
            f"{source.count('(')} parentheses open and {source.count(')')} close; the line may be cut"
        )
    if label != value:
        raise ValueError(f"the label is {label}, but the expression is {value}")
    return tokens, label
