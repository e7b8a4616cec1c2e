"""Rows of cut and shuffled documents are the documents again once parts are sorted and tags are left out."""

import numpy as np
import pytest

from experiments.data.pipeline import IGNORE
from experiments.data.text.knots import Knotted, knotted
from experiments.tasks import make_task
from tests.experiments.data.text.test_packing import END, documents

FIRST = 100


def untied(mixed):
    """The documents of a text without tags, by following tags; those that are cut at an end stay as they are."""
    mixed = mixed.tolist()
    texts, open_at = [], {}
    current = []
    for token in mixed:
        if token < FIRST:
            current.append(token)
            if token == END:
                texts.append(current)
                current = []
        elif token in open_at:
            current = open_at.pop(token)
        else:
            open_at[token], current = current, []
    assert not open_at
    return [*texts, current]


@pytest.mark.parametrize("seed", range(20))
def test_the_documents_are_there_once_tags_are_followed(seed):
    rng = np.random.default_rng(seed)
    parts = [rng.integers(1, 90, size) for size in (7, 1, 12, 3)]
    text = np.concatenate([np.append(part, END) for part in parts])[:-1]
    mixed, counted = knotted(text, END, 6, FIRST, seed)
    whole = [[*part.tolist(), END] for part in parts[:-1]] + [parts[-1].tolist()]
    assert sorted(untied(mixed)) == sorted(whole)
    tags, times = np.unique(mixed[mixed >= FIRST], return_counts=True)
    assert len(tags) <= 6
    assert (times == 2).all()
    # Neither a tag nor the first token is predicted, and all else is.
    np.testing.assert_array_equal(counted[1:], mixed[1:] < FIRST)
    assert not counted[0]
    assert mixed[-1] == text[-1]
    np.testing.assert_array_equal(knotted(text, END, 6, FIRST, seed)[0], mixed)


def test_cuts_and_orders_vary():
    text = np.concatenate([np.append(np.arange(1, 30), END), np.arange(30, 60)])
    found = [knotted(text, END, 4, FIRST, seed)[0] for seed in range(60)]
    counts = {len(mixed) - len(text) for mixed in found}
    assert counts == {0, 2, 4, 6, 8}
    cut = [tuple(mixed) for mixed in found if len(mixed) > len(text)]
    assert len(set(cut)) == len(cut) > 30
    assert any((mixed[:5] != text[:5]).any() for mixed in found)
    assert {tag for mixed in found for tag in mixed.tolist() if tag >= FIRST} == set(range(FIRST, FIRST + 4))


def test_labels_are_the_next_tokens():
    rows = Knotted(documents([9, 14, 30, 5]), END, length=16, tags=3, first_tag=FIRST)
    batch = rows.gather(np.arange(len(rows)), 18)
    assert batch["inputs"].shape == (4, 18)
    for row, (inputs, labels) in enumerate(zip(batch["inputs"], batch["labels"], strict=True)):
        assert (labels[16:] == IGNORE).all()
        real = np.flatnonzero(labels[:15] != IGNORE)
        np.testing.assert_array_equal(labels[real], inputs[real + 1])
        assert (inputs[1:16][labels[:15] == IGNORE] >= FIRST).all() or row == 3
        assert (batch["segment_ids"][row] == (np.arange(18) < 16)).all()
    one = rows.gather(np.array([2]), 16)
    np.testing.assert_array_equal(one["inputs"][0], batch["inputs"][2, :16])


def test_the_task_has_a_token_per_tag(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of a text" for n in range(200)))
    options = dict(source=str(tmp_path / "text.txt"), data_dir=str(tmp_path / "data"), length=32)
    plain = make_task("language", **options, packing="concatenate", reset=False)
    task = make_task("language", **options, packing="concatenate", reset=False, knots=4)
    assert task.vocab_size == plain.vocab_size + 4 == type(task).sizes(knots=4)["vocab_size"]
    inputs = task.splits["train"].gather(np.arange(8), 32)["inputs"]
    assert inputs.max() >= plain.vocab_size
    validation = task.splits["validation"].gather(np.arange(2), 32)["inputs"]
    np.testing.assert_array_equal(validation, plain.splits["validation"].gather(np.arange(2), 32)["inputs"])
    assert task.manifest["rows"]["knots"] == 4
    assert "knots" not in plain.manifest["rows"]
