"""Texts of tensorflow-datasets, which have been prepared as array_record files; reading them needs no TensorFlow.

    pip install 'jax-seqmodels[prepare]'
    tfds build lm1b --file_format=array_record --data_dir=FOLDER

pg19, lm1b, wiki40b and tiny_shakespeare were made for language models; any other data set with a text feature works. An
example is a document. If there is no split "validation", as in lm1b, the documents of "train" whose text the hash of
`documents.split_of` gives to "validation" are in it, one in twenty.
"""

import os
from collections.abc import Iterator
from typing import Any

from experiments.data.cache import expand
from experiments.data.text.documents import SPLITS, Documents, decoded, split_of

PREFIX = "tfds:"
TEXTS = ("text", "book_text")  # names of features, the first that there is
AT_ONCE = 1024  # number of examples that are read in one call


def read(source: str, official_dir: str | os.PathLike | None, invalid: str) -> Documents:
    """Returns the documents of a prepared data set by split.

    Args:
      source: "tfds:NAME" or "tfds:NAME/CONFIG", with ":VERSION" behind it to choose one of several.
      official_dir: folder in which it was prepared (`data_dir` of tensorflow-datasets); by default $TFDS_DATA_DIR, else
        ~/tensorflow_datasets.
      invalid: see `sources.read_documents`.

    Raises:
      ValueError: there is no such data set, it has no text or no files of array_record, or a file is damaged.
    """
    from tensorflow_datasets.core import read_only_builder, registered

    name = source.removeprefix(PREFIX)
    folder = expand(
        "official_dir", official_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    )
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except registered.DatasetNotFoundError:
        raise ValueError(
            f"source={source!r} is not prepared in {folder}; run `tfds build {name} --file_format=array_record "
            f"--data_dir={folder}` (extra prepare), or give the folder as official_dir"
        ) from None
    except Exception as error:  # noqa: BLE001  # a damaged description raises what its parser does
        raise ValueError(f"source={source!r}: its description in {folder} cannot be read: {error}") from None
    splits, features = builder.info.splits, builder.info.features or {}
    text = next((feature for feature in TEXTS if feature in features), None)
    if text is None:
        raise ValueError(
            f"source={source!r} has the features {', '.join(sorted(features))}; expected one of {', '.join(TEXTS)}"
        )
    if missing := [split for split in ("train", "test") if split not in splits]:
        raise ValueError(f"source={source!r} has no split {missing[0]!r}; it has {', '.join(splits)}")
    held_out = "validation" not in splits
    documents: Documents = {split: [] for split in SPLITS}
    for split in SPLITS[:1] + SPLITS[2:] if held_out else SPLITS:
        for number, data in enumerate(_examples(source, builder, split, text)):
            document = decoded(data, f"{source}, {split} {number}", invalid)
            moved = held_out and split == "train" and split_of(document) == "validation"
            if document:
                documents["validation" if moved else split].append(document)
    return documents


def _examples(source: str, builder: Any, split: str, text: str) -> Iterator[bytes]:
    """Yields the texts of a split as bytes."""
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"source={source!r} is prepared as {builder.info.file_format.value}; prepare it with --file_format=array_record"
        )
    try:
        examples = builder.as_data_source(split=split)
        for start in range(0, len(examples), AT_ONCE):
            for example in examples.__getitems__(range(start, min(start + AT_ONCE, len(examples)))):
                if not isinstance(example[text], bytes):
                    raise RuntimeError("a record has no text")
                yield example[text]
    except Exception as error:  # noqa: BLE001  # array_record and protobuf raise what they like
        raise ValueError(
            f"source={source!r}: the split {split!r} is damaged or incomplete: {error}"
        ) from None
