"""IMDB reviews from small folders and files in the official formats."""

import collections
import json

import numpy as np
import pytest
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from experiments.data import imdb, prepare
from experiments.data.text.characters import frequent_characters
from experiments.tasks import make_task

GOOD, BAD = "très bon film! <br />", "a dull, dull film"


@pytest.fixture
def official(tmp_path):
    """A folder aclImdb with 12 training and 6 test reviews, and what stands beside them in the archive."""
    folder = tmp_path / "aclImdb"
    for split, count in (("train", 6), ("test", 3)):
        for label, text, rating in (("neg", BAD, 2), ("pos", GOOD, 10)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                path = folder / split / label / f"{number}_{rating}.txt"
                path.write_text(f"{text} {split} {count - 1 - number}\n", encoding="utf-8")
    (folder / "train/unsup").mkdir()
    (folder / "train/unsup/0_0.txt").write_text("no label")
    (folder / "imdb.vocab").write_text("film")
    return folder


@pytest.fixture
def prepared(official, tmp_path):
    """The same reviews as tensorflow-datasets writes them."""
    root = tmp_path / "tfds/imdb_reviews/plain_text/1.0.0"
    root.mkdir(parents=True)
    splits = []
    for split, reviews in imdb.read_folder(official).items():
        path = root / f"imdb_reviews-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for text, label in reversed(reviews):
            example = tf_example_pb2.Example()
            example.features.feature["text"].bytes_list.value.append(text.encode())
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        splits.append(dict(name=split, shardLengths=[str(len(reviews))], filepathTemplate=template))
    info = dict(name="imdb_reviews", version="1.0.0", fileFormat="array_record", splits=splits)
    module = "tensorflow_datasets.core.features"
    features = dict(
        label=dict(
            classLabel=dict(numClasses="2"), pythonClassName=f"{module}.class_label_feature.ClassLabel"
        ),
        text=dict(text={}, pythonClassName=f"{module}.text_feature.Text"),
    )
    features = dict(
        featuresDict=dict(features=features), pythonClassName=f"{module}.features_dict.FeaturesDict"
    )
    (root / "dataset_info.json").write_text(json.dumps(info))
    (root / "features.json").write_text(json.dumps(features))
    (root / "label.labels.txt").write_text("neg\npos\n")
    return tmp_path / "tfds"


def texts(task):
    names = task.manifest["vocabulary"]
    return {
        split: [("".join(names[id_] for id_ in source[n][0]), source[n][1]) for n in range(len(source))]
        for split, source in task.splits.items()
    }


def test_both_sources_give_the_same_splits(official, prepared, tmp_path):
    options = dict(validation=4, seed=3, vocabulary="bytes", data_dir=tmp_path / "data")
    task = make_task("imdb", official_dir=official, **options)
    assert task.manifest == make_task("imdb", tfds_dir=prepared, **options).manifest
    assert {split: len(source) for split, source in task.splits.items()} == dict(
        train=8, validation=4, test=6
    )
    assert (task.vocab_size, task.num_classes) == (257, 2)
    decoded = {
        split: [(bytes(np.array(s[n][0]) - 1).decode(), s[n][1]) for n in range(len(s))]
        for split, s in task.splits.items()
    }
    expected = {(f"{text} {{}} {{}}", label) for text, label in ((BAD, 0), (GOOD, 1))}
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(
        (text.format("train", n), label) for text, label in expected for n in range(6)
    )
    assert sorted(decoded["test"]) == sorted(
        (text.format("test", n), label) for text, label in expected for n in range(3)
    )
    other = make_task("imdb", official_dir=official, **options | dict(seed=4))
    assert other.splits["validation"].tokens.tolist() != task.splits["validation"].tokens.tolist()
    assert other.splits["test"].tokens.tolist() == task.splits["test"].tokens.tolist()


def test_characters_are_numbered_by_frequency_and_end_with_eos(official, tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "LEAST", 7)
    task = make_task("imdb", official_dir=official, validation=1, length=12, data_dir=tmp_path / "data")
    counts = collections.Counter()
    for label in task.splits["train"].labels:
        counts.update((BAD, GOOD)[label][:11])
    frequent = [letter for letter, count in counts.items() if count >= 7]
    frequent.sort(key=lambda letter: (-counts[letter], letter))
    assert "è" not in frequent
    assert task.manifest["vocabulary"] == ["<pad>", "<unk>", "<eos>", *frequent]
    seen = "".join(letter if letter in frequent else "<unk>" for letter in GOOD[:11])
    assert (f"{seen}<eos>", 1) in texts(task)["test"]
    assert task.splits["train"].lengths.tolist() == [12] * 11
    assert max(source.tokens.max() for source in task.splits.values()) < task.vocab_size == 135


def test_rare_characters_and_more_than_the_most_are_left_out():
    found = frequent_characters(["aabbbc", "ddd", "xyz"], length=7, least=2, most=3)
    assert found == ("b", "d", "a")
    assert frequent_characters(["aabbbc"], length=4, least=1, most=9) == ("a", "b")


def damage(folder, how):
    review = folder / "test/pos/1_10.txt"
    if how == "bytes":
        review.write_bytes(b"good \xff film")
    elif how == "empty":
        review.write_text(" \n")
    elif how == "name":
        (folder / "test/pos/notes.txt").write_text("good")
    elif how == "rating":
        (folder / "test/pos/7_2.txt").write_text("good")
    elif how == "none":
        for path in (folder / "test/pos").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    "how, message",
    [
        ("bytes", r"test/pos/1_10.txt: byte 6, 0xff, is no UTF-8"),
        ("empty", r"test/pos/1_10.txt: the review is empty"),
        ("name", r"test/pos/notes.txt: expected a review ID_RATING.txt with a rating from 7 to 10"),
        ("rating", r"test/pos/7_2.txt: expected a review ID_RATING.txt with a rating from 7 to 10"),
        ("none", r"test/pos has no reviews; expected files such as 0_7.txt"),
    ],
)
def test_malformed_files_are_named(official, tmp_path, how, message):
    damage(official, how)
    with pytest.raises(ValueError, match=message):
        make_task("imdb", official_dir=official, validation=2, data_dir=tmp_path / "data")


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "train/pos").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"lacks train/neg, test/neg, test/pos; unpack aclImdb_v1"):
        make_task("imdb", official_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no imdb_reviews; prepare it once"):
        make_task("imdb", tfds_dir=tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "task.official_dir=None and task.tfds_dir=None; IMDB is not downloaded"),
        (dict(official_dir="x", tfds_dir="y"), "and not both"),
        (
            dict(official_dir="x", vocabulary="words"),
            "task.vocabulary='words' is unknown; choose from bytes, char",
        ),
        (dict(official_dir="x", length=1), "task.length=1"),
        (dict(official_dir="x", validation=0), "task.validation=0"),
        (dict(official_dir="x", seed=-1), "task.seed=-1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("imdb", **options)


def test_more_held_out_than_there_is_is_refused(official, tmp_path):
    with pytest.raises(ValueError, match=r"task.validation=12 of 12 training examples.*expected 1 to 11"):
        make_task("imdb", official_dir=official, validation=12, data_dir=tmp_path / "data")


def test_the_command_prepares_what_the_task_reads(official, tmp_path, capsys):
    data = tmp_path / "data"
    command = ["imdb", f"--official_dir={official}", "--validation=4", f"--data_dir={data}"]
    assert prepare.main(command) == 0
    assert "train" in capsys.readouterr().out
    (folder,) = data.iterdir()
    before = (folder / "manifest.json").stat().st_mtime_ns
    make_task("imdb", official_dir=official, validation=4, data_dir=data)
    assert [path.name for path in data.iterdir()] == [folder.name]
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert prepare.main([*command, "--seed=-1"]) == 2
    assert "--seed=-1: expected at least 0" in capsys.readouterr().err
