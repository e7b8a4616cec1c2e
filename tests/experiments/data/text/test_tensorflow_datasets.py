"""Data sets that tensorflow-datasets has prepared, in the form of its files, are read without TensorFlow."""

import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from experiments.data.text.documents import split_of
from experiments.data.text.sources import read_documents

TEXTS = {
    "train": [f"é{number} one\ntwo" for number in range(1500)],
    "validation": ["", "held out"],
    "test": ["a test"],
}


def prepared(root, name, splits, *, feature="text", file_format="array_record", shards=2):
    """Writes what `tfds build` writes."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    features = {feature: tfds.features.Text(), "number": tfds.features.Scalar(dtype=np.int32)}
    tfds.features.FeaturesDict(features).save_config(str(folder))
    entries = []
    for split, texts in splits.items():
        parts = [texts[: len(texts) // 2], texts[len(texts) // 2 :]] if shards == 2 else [texts]
        for number, part in enumerate(parts):
            file = folder / f"{name.partition('/')[0]}-{split}.array_record-{number:05}-of-{len(parts):05}"
            writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
            for text in part:
                example = tf_example_pb2.Example()
                example.features.feature[feature].bytes_list.value.append(
                    text if isinstance(text, bytes) else text.encode()
                )
                example.features.feature["number"].int64_list.value.append(len(text))
                writer.write(example.SerializeToString())
            writer.close()
        entries.append(
            dict(
                name=split,
                filepathTemplate="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                numBytes="1",
                shardLengths=[str(len(part)) for part in parts],
            )
        )
    name, _, config = name.partition("/")
    info = dict(name=name, version="1.0.0", fileFormat=file_format, splits=entries)
    (folder / "dataset_info.json").write_text(json.dumps(info | (dict(configName=config) if config else {})))
    return folder


def test_documents_are_the_examples(tmp_path, monkeypatch):
    prepared(tmp_path, "tiny_shakespeare", TEXTS)
    expected = TEXTS | {"validation": ["held out"]}
    assert read_documents("tfds:tiny_shakespeare", official_dir=tmp_path) == expected
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert read_documents("tfds:tiny_shakespeare:1.0.0") == expected
    prepared(tmp_path, "pg19", TEXTS, feature="book_text")
    assert read_documents("tfds:pg19") == expected
    prepared(tmp_path, "wiki40b/en", TEXTS)
    assert read_documents("tfds:wiki40b/en") == expected
    assert "tensorflow" not in sys.modules


def test_a_validation_split_is_held_out_of_the_training_split(tmp_path):
    prepared(tmp_path, "lm1b", {split: TEXTS[split] for split in ("train", "test")}, shards=1)
    documents = read_documents("tfds:lm1b", official_dir=tmp_path)
    held_out = [text for text in TEXTS["train"] if split_of(text) == "validation"]
    assert 50 < len(held_out) < 100
    assert documents["validation"] == held_out
    assert documents["train"] == [text for text in TEXTS["train"] if text not in held_out]
    assert documents["test"] == TEXTS["test"]


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    def refused(name, message, **options):
        with pytest.raises(ValueError, match=message):
            read_documents(f"tfds:{name}", official_dir=tmp_path, **options)

    refused(
        "lm1b", "source='tfds:lm1b' is not prepared in .*; run `tfds build lm1b --file_format=array_record"
    )
    prepared(tmp_path, "mnist", TEXTS, feature="image")
    refused("mnist", "source='tfds:mnist' has the features image, number; expected one of text, book_text")
    prepared(tmp_path, "no_test", {"train": ["a"]}, shards=1)
    refused("no_test", "has no split 'test'; it has train")
    prepared(tmp_path, "records", TEXTS, file_format="tfrecord")
    refused("records", "is prepared as tfrecord; prepare it with --file_format=array_record")
    bad = TEXTS | {"test": [b"ab\xff"]}
    prepared(tmp_path, "latin", bad, shards=1)
    refused("latin", r"tfds:latin, test 0 is not UTF-8 at byte 2 \(0xff\)")
    assert read_documents("tfds:latin", official_dir=tmp_path, invalid="replace")["test"] == ["ab\ufffd"]
    folder = prepared(tmp_path, "lost", TEXTS)
    (folder / "lost-test.array_record-00001-of-00002").unlink()
    refused("lost", "the split 'test' is damaged or incomplete: .*No such file")
    folder = prepared(tmp_path, "cut", TEXTS, shards=1)
    file = folder / "cut-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused("cut", "the split 'train' is damaged or incomplete")
    folder = prepared(tmp_path, "broken", TEXTS)
    (folder / "dataset_info.json").write_text("{")
    refused("broken", "source='tfds:broken': its description in .* cannot be read")
