"""Film reviews of IMDB with a sentiment each, byte by byte or character by character, with a validation split held out.

The reviews come from the folder aclImdb (Maas et al. 2011) or from the files that tensorflow-datasets has prepared for
`imdb_reviews`. White space around a review is left out, and reviews are sorted by their text, so that both sources give the
same data set.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from experiments.data import cache
from experiments.data.held_out import hold_out
from experiments.data.sequences import Sequences
from experiments.data.text.characters import (
    SPECIALS,
    Encoding,
    bytes_encoding,
    characters_encoding,
    frequent_characters,
)

LABELS = ("neg", "pos")
RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}  # a review in between is in neither folder
FILE = re.compile(r"\d+_(\d+)\.txt")
SPLITS = ("train", "test")
TFDS = "imdb_reviews"
VERSION = 1
# S4 and S5 keep the characters that occur 15 times or more in the 25,000 training reviews; with <pad>, <unk> and <eos>: 135.
LEAST, CHARACTERS = 15, 135

Reviews = list[tuple[str, int]]


def load(
    *,
    official_dir: str | os.PathLike | None = None,
    tfds_dir: str | os.PathLike | None = None,
    vocabulary: str,
    length: int,
    validation: int,
    seed: int,
    data_dir: str | os.PathLike | None = None,
) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test", read on first use and cached.

    Args:
      official_dir: folder aclImdb, with train/pos, train/neg, test/pos and test/neg.
      tfds_dir: folder of tensorflow-datasets, in which `imdb_reviews` has been prepared as array_record; read without
        TensorFlow. One of the two is given.
      vocabulary: "bytes" or "characters" (see `data.text.characters`). Characters are counted in the training split alone.
      length: most ids of a review.
      validation: number of training reviews that are held out.
      seed: seed that chooses them.

    Raises:
      FileNotFoundError: if a folder is missing.
      ValueError: if both folders or none are given, or a file is malformed; names it.
    """
    if (official_dir is None) == (tfds_dir is None):
        raise ValueError(
            f"task.official_dir={official_dir!r} and task.tfds_dir={tfds_dir!r}; IMDB is not downloaded: give the folder "
            "aclImdb of its archive as official_dir, or a folder of tensorflow-datasets as tfds_dir, and not both"
        )
    if official_dir is not None:
        folder = cache.expand("official_dir", official_dir)
        reviews, given = read_folder(folder), f"--official_dir={shlex.quote(str(folder))}"
    else:
        folder = cache.expand("tfds_dir", tfds_dir)
        reviews, given = read_tfds(folder), f"--tfds_dir={shlex.quote(str(folder))}"
    kept, held_out = hold_out(len(reviews["train"]), validation, seed=seed)
    rows = {"train": kept, "validation": held_out}
    splits = {name: [reviews["train"][row] for row in chosen] for name, chosen in rows.items()}
    splits |= {"test": reviews["test"]}
    encoding = _encoding(vocabulary, splits["train"], length)
    recipe = cache.Recipe(
        name="imdb",
        version=VERSION,
        parameters=dict(
            vocabulary=vocabulary,
            length=length,
            validation=validation,
            seed=seed,
            reviews={name: _sha256(reviews[name]) for name in SPLITS},
        ),
        vocabulary=encoding.vocabulary,
        rebuild=f"python -m experiments.data.prepare imdb --vocabulary={vocabulary} --length={length} "
        f"--validation={validation} --seed={seed} {given}",
    )

    def build() -> dict[str, Sequences]:
        return {
            name: Sequences.from_records((encoding.encode(text).tobytes(), label) for text, label in split)
            for name, split in splits.items()
        }

    return cache.load_or_build(recipe, build, data_dir=data_dir)


def _encoding(vocabulary: str, train: Reviews, length: int) -> Encoding:
    if vocabulary == "bytes":
        return bytes_encoding(length)
    texts = (text for text, _ in train)
    most = CHARACTERS - len(SPECIALS)
    return characters_encoding(frequent_characters(texts, length=length, least=LEAST, most=most), length)


def read_folder(folder: Path) -> Mapping[str, Reviews]:
    """Returns the reviews of "train" and "test" and their labels, 0 for neg and 1 for pos, sorted by text.

    Raises:
      FileNotFoundError: if a folder is missing.
      ValueError: if a folder has no review, or a file is no review: its name is not ID_RATING.txt with a rating that belongs
        into its folder, it is not UTF-8, or it is empty.
    """
    parts = [(split, label) for split in SPLITS for label in LABELS]
    if missing := [f"{split}/{label}" for split, label in parts if not (folder / split / label).is_dir()]:
        raise FileNotFoundError(
            f"official_dir={str(folder)!r} lacks {', '.join(missing)}; unpack aclImdb_v1.tar.gz and give the folder aclImdb"
        )
    reviews: dict[str, Reviews] = {split: [] for split in SPLITS}
    for split, label in parts:
        paths = sorted((folder / split / label).iterdir())
        if not paths:
            raise ValueError(
                f"{folder / split / label} has no reviews; expected files such as 0_{RATINGS[label][0]}.txt"
            )
        reviews[split] += [(_read(path, label), LABELS.index(label)) for path in paths]
    return {split: sorted(found) for split, found in reviews.items()}


def _read(path: Path, label: str) -> str:
    found = FILE.fullmatch(path.name)
    if found is None or int(found[1]) not in RATINGS[label]:
        ratings = RATINGS[label]
        raise ValueError(
            f"{path}: expected a review ID_RATING.txt with a rating from {ratings[0]} to {ratings[-1]}, such as "
            f"0_{ratings[0]}.txt"
        )
    return _decoded(path.read_bytes(), str(path))


def _decoded(content: bytes, where: str) -> str:
    try:
        text = content.decode().strip()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"{where}: byte {error.start + 1}, {byte:#04x}, is no UTF-8 text") from None
    if not text:
        raise ValueError(f"{where}: the review is empty")
    return text


def read_tfds(folder: Path) -> Mapping[str, Reviews]:
    """Returns the reviews that tensorflow-datasets has in a folder, in the form of `read_folder`.

    Raises:
      FileNotFoundError: if `imdb_reviews` is not there.
      ValueError: if it is not in the format array_record, or a record is malformed.
    """
    import tensorflow_datasets as tfds  # takes a second, which other data need not wait for

    prepare = (
        f"prepare it once where TensorFlow is installed: tfds build {TFDS} --data_dir={shlex.quote(str(folder))} "
        "--file_format=array_record"
    )
    places = sorted((folder / TFDS).glob("**/dataset_info.json"))
    if not places:
        raise FileNotFoundError(f"tfds_dir={str(folder)!r} has no {TFDS}; {prepare}")
    builder = tfds.builder_from_directory(str(places[-1].parent))
    if (found := builder.info.file_format.value) != "array_record":
        raise ValueError(f"{places[-1].parent}: the files are {found}, which needs TensorFlow; {prepare}")
    if lacking := [split for split in SPLITS if split not in builder.info.splits]:
        raise ValueError(f"{places[-1].parent} has no split {lacking[0]!r}; {prepare}")
    reviews: dict[str, Reviews] = {}
    for split in SPLITS:
        records = builder.as_data_source(split=split)
        reviews[split] = sorted(_checked(records[n], f"{split}, record {n}") for n in range(len(records)))
    return reviews


def _checked(record: Mapping[str, object], where: str) -> tuple[str, int]:
    if not {"text", "label"} <= record.keys() or record["label"] not in range(len(LABELS)):
        raise ValueError(f"{TFDS}, {where}: expected a text and a label, 0 or 1; got {record}")
    return _decoded(record["text"], f"{TFDS}, {where}"), int(record["label"])


def _sha256(reviews: Reviews) -> str:
    digest = hashlib.sha256()
    for text, label in reviews:
        content = text.encode()
        digest.update(f"{label} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
