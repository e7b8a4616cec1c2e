"""Pairs of papers from small files in the official format."""

import numpy as np
import pytest

from experiments.data import aan, prepare
from experiments.data.pairs import Pairs
from experiments.data.sequences import Sequences
from experiments.tasks import make_task

ROWS = {
    "train": [(1, 'He said "yes', "and'\""), (0, "naïve", "x" * 30), (1, "", "short")],
    "validation": [(0, "v one", "v two")],
    "test": [(1, "t one", "t two"), (0, "t three", "t four")],
}


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    for split, rows in ROWS.items():
        lines = [f"{label}.0\tP{n}\tQ{n}\t{one}\t{two}\n" for n, (label, one, two) in enumerate(rows)]
        (folder / aan.FILES[split]).write_text("".join(lines), encoding="utf-8")
    return folder


def decoded(task, split, index):
    source, names = task.splits[split], task.manifest["vocabulary"]
    batch = source.gather(np.array([index]), int(source.lengths[index]))
    texts = [
        [id_ for id_, real in zip(*rows, strict=True) if real]
        for rows in zip(batch["inputs"][0], batch["segment_ids"][0], strict=True)
    ]
    if task.vocab_size == 257:
        return [bytes(id_ - 1 for id_ in ids).decode() for ids in texts], int(batch["labels"][0])
    return ["".join(names[id_] for id_ in ids) for ids in texts], int(batch["labels"][0])


def test_pairs_keep_their_texts_and_labels(official, tmp_path):
    task = make_task("aan", official_dir=official, vocabulary="bytes", length=20, data_dir=tmp_path)
    assert (task.vocab_size, task.num_classes, task.pairs) == (257, 2, True)
    assert {split: len(source) for split, source in task.splits.items()} == dict(
        train=3, validation=1, test=2
    )
    for split, rows in ROWS.items():
        for index, (label, one, two) in enumerate(rows):
            assert decoded(task, split, index) == ([one or " ", two[:20]], label)
    batch = task.splits["train"].gather(np.array([1, 0]), 24)
    assert {name: array.shape for name, array in batch.items()} == dict(
        inputs=(2, 2, 24), segment_ids=(2, 2, 24), labels=(2,)
    )
    assert batch["labels"].tolist() == [0, 1]
    assert task.splits["train"].lengths.tolist() == [12, 20, 5]


def test_characters_outside_of_the_table_are_unknown(official, tmp_path):
    task = make_task("aan", official_dir=official, length=6, data_dir=tmp_path)
    assert task.vocab_size == 98
    assert decoded(task, "train", 1) == (["na<unk>ve<eos>", "xxxxx<eos>"], 0)
    assert decoded(task, "train", 2)[0] == [" <eos>", "short<eos>"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("1.0\tP\tQ\tone", "expected label, id 1, id 2, text 1, text 2 between tabs, got 4 fields"),
        ("1.0\tP\tQ\tone\ttwo\tthree", "got 6 fields"),
        ("2.0\tP\tQ\tone\ttwo", "the label must be 0.0 or 1.0, got b'2.0'"),
        ("", "got 1 fields"),
    ],
)
def test_a_malformed_line_is_named(official, tmp_path, line, message):
    path = official / aan.FILES["validation"]
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=rf"new_aan_pairs.eval.tsv:2: .*{message}"):
        make_task("aan", official_dir=official, data_dir=tmp_path)


def test_files_that_are_missing_empty_or_no_text_are_named(official, tmp_path):
    path = official / aan.FILES["test"]
    path.write_bytes(b"1.0\tP\tQ\tone\tt\xffo\n")
    with pytest.raises(ValueError, match="test.tsv:1: byte 2 of text 2, 0xff, is no UTF-8"):
        make_task("aan", official_dir=official, data_dir=tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="test.tsv has no pairs"):
        make_task("aan", official_dir=official, data_dir=tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks new_aan_pairs.test.tsv; unpack the Retrieval files"):
        make_task("aan", official_dir=official, data_dir=tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "task.official_dir is not given"),
        (dict(official_dir="x", vocabulary="words"), "task.vocabulary='words' is unknown"),
        (dict(official_dir="x", length=1), "task.length=1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("aan", **options)


@pytest.mark.parametrize("labels", [[1, 1, 0], [1, 0]])
def test_sequences_that_are_no_pairs_are_refused(labels):
    stored = Sequences(np.arange(len(labels)), np.arange(len(labels) + 1), np.array(labels))
    with pytest.raises(ValueError, match="no pairs"):
        Pairs(stored)


def test_the_command_prepares_the_files(official, tmp_path, capsys):
    assert prepare.main(["aan", f"--official_dir={official}", f"--data_dir={tmp_path / 'data'}"]) == 0
    assert "aan version 1" in capsys.readouterr().out
