"""Recall and copying: every label against a solver that reads the sequence token by token."""

import numpy as np
import pytest

from experiments.tasks import make_task
from experiments.tasks.tokens import IGNORE

SIZES = dict(train=60, validation=20, test=60)


def rows(task, split):
    source = task.splits[split]
    found = source.gather(np.arange(len(source)), int(source.lengths.max()))
    return zip(found["inputs"].tolist(), found["labels"].tolist(), strict=True)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(length=64, pairs=16), dict(shuffle_queries=True, power=1.0), dict(vocab_size=21)],
)
def test_mqar(options):
    task = make_task("mqar", **SIZES, **(dict(vocab_size=50, length=32, pairs=5) | options))
    vocab_size, length, pairs = task.vocab_size, task.length, task.pairs
    for inputs, labels in rows(task, "test"):
        table, asked = {}, []
        for place in range(0, 2 * pairs, 2):
            key, value = inputs[place : place + 2]
            assert 1 <= key < vocab_size // 2 <= value < vocab_size
            table[key] = value
        assert len(table) == len(set(table.values())) == pairs
        for place, (token, label) in enumerate(zip(inputs, labels, strict=True)):
            query = place >= 2 * pairs and token != 0
            assert label == (table[token] if query else IGNORE)
            assert not query or place % 2 == 0
            asked += [token] * query
        assert sorted(asked) == sorted(table)
        assert len(inputs) == length


def test_mqar_places_queries_as_its_authors_do():
    """The share of rows that ask at each of the first places, and ask first for the first key, with 4 pairs in 64."""
    labels, firsts = [], []
    for options in (dict(), dict(shuffle_queries=True), dict(power=1.0)):
        task = make_task("mqar", train=20_000, **options)
        data = task.splits["train"].gather(np.arange(20_000), 64)
        asked = data["labels"] != IGNORE
        labels.append(asked[:, 8::2].mean(axis=0))
        first = np.take_along_axis(data["inputs"], asked.argmax(axis=1)[:, None], axis=1)[:, 0]
        firsts.append(np.mean(first == data["inputs"][:, 0]))
    np.testing.assert_allclose(labels[0][:4], [0.72, 0.477, 0.348, 0.272], atol=0.015)
    np.testing.assert_allclose(labels[1], labels[0], atol=0.02)
    np.testing.assert_allclose(labels[2], 4 / 28, atol=0.015)
    np.testing.assert_allclose(firsts, [0.33, 0.25, 0.25], atol=0.015)


def test_mqar_filler_and_further_splits():
    task = make_task("mqar", **SIZES, vocab_size=40, random_filler=True, extrapolate=((16, 2), (80, 7)))
    plain = make_task("mqar", **SIZES, vocab_size=40, extrapolate=((16, 2), (80, 7)))
    for split, (length, pairs) in {
        "length_16_pairs_2": (16, 2),
        "length_80_pairs_7": (80, 7),
        "train": (64, 4),
    }.items():
        for (filled, labels), (inputs, same) in zip(rows(task, split), rows(plain, split), strict=True):
            assert len(filled) == length
            assert labels == same
            assert sum(label != IGNORE for label in labels) == pairs
            assert all(a == b for a, b in zip(filled, inputs, strict=True) if b != 0)
            assert len(set(filled)) > len(set(inputs))


@pytest.mark.parametrize("split, length", [("train", 20), ("test", 20), ("length_7", 7), ("length_0", None)])
def test_selective_copying(split, length):
    if length is None:
        with pytest.raises(ValueError, match=r"extrapolate=\(0,\)"):
            make_task("selective_copying", extrapolate=(0,))
        return
    task = make_task("selective_copying", **SIZES, vocab_size=6, length=20, tokens=4, extrapolate=(7,))
    for inputs, labels in rows(task, split):
        assert len(inputs) == length + 8
        data = [token for token in inputs[:-4] if token != 0]
        assert all(1 <= token < 5 for token in data)
        assert inputs[-4:] == [5] * 4
        assert labels == [IGNORE] * (length + 4) + data
        assert len(data) == 4


@pytest.mark.parametrize("split, length", [("train", 10), ("test", 10), ("length_3", 3), ("length_33", 33)])
def test_induction_heads(split, length):
    task = make_task("induction_heads", **SIZES, symbols=5, length=10, extrapolate=(3, 33))
    places = set()
    for inputs, labels in rows(task, split):
        assert len(inputs) == length
        assert inputs.count(5) == 2
        assert inputs[-1] == 5
        places.add(inputs.index(5))
        assert labels == [IGNORE] * (length - 1) + [inputs[inputs.index(5) + 1]]
        assert labels[-1] < 5
    assert places <= set(range(length - 2))
    assert length > 10 or len(places) == length - 2


@pytest.mark.parametrize("answers_only", [False, True])
def test_associative_recall(answers_only):
    task = make_task("associative_recall", **SIZES, answers_only=answers_only, extrapolate=(10,))
    for split, length in (("train", 40), ("test", 40), ("length_10", 10)):
        queried = set()
        for inputs, labels in rows(task, split):
            assert len(inputs) == length + 2
            assert inputs[length] == 18
            table = {}
            for place in range(0, length, 2):
                key, value = inputs[place : place + 2]
                assert 0 <= key < 9 <= value < 18
                assert table.setdefault(key, value) == value
            answer = table[inputs[-1]]
            queried.add(inputs[-1])
            if split == "train" and not answers_only:
                assert labels == [*inputs[1:], answer]
            else:
                assert labels == [IGNORE] * (length + 1) + [answer]
        assert queried == set(range(9))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_mad_recall(noise):
    name = "mad_noisy_recall" if noise else "mad_in_context_recall"
    task = make_task(name, **SIZES, length=40, **(dict(noise=noise) if noise else {}))
    noisy_pairs = 0
    for split in ("train", "test"):
        for inputs, labels in rows(task, split):
            table, expected = {}, []
            for place in range(0, 38, 2):
                first, second = inputs[place : place + 2]
                if first >= 16:
                    assert 16 <= second < 32
                    assert noise
                    expected += [IGNORE, IGNORE]
                    noisy_pairs += 1
                    continue
                assert 0 <= first < 8 <= second < 16
                expected += [second if first in table else IGNORE, IGNORE]
                assert table.setdefault(first, second) == second
            expected.append(table[inputs[38]])
            assert len(inputs) == 39
            assert labels == ([*inputs[1:], expected[-1]] if split == "train" else expected)
    assert noisy_pairs / (120 * 19) == pytest.approx(noise * 18 / 19, abs=0.05)


def parse_fuzzy(text, half):
    """The pairs of a row: keys are runs below `half`, values runs from there on."""
    pairs, place = [], 0
    while place < len(text):
        start = place
        while text[place] < half:
            place += 1
        middle = place
        while place < len(text) and text[place] >= half:
            place += 1
        pairs.append((tuple(text[start:middle]), tuple(text[middle:place]), middle))
    return pairs


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("motif, length", [(2, 60), (3, 128), (3, 18)])
def test_mad_fuzzy_recall(split, motif, length):
    task = make_task("mad_fuzzy_recall", **SIZES, motif=motif, length=length)
    sizes = set()
    for inputs, labels in rows(task, split):
        assert len(inputs) == length
        fill = next(i for i, token in enumerate(inputs) if token != 15)
        assert 15 not in inputs[fill:]
        # Where the text starts right after the row's first token, the last value is one token longer.
        last = [label for label in labels if label != IGNORE][-1]
        text = [*inputs[fill:], last]
        table, expected = {}, [IGNORE] * len(text)
        for key, value, place in parse_fuzzy(text, 7):
            sizes.add((len(key), len(value)))
            assert len(set(key)) == len(key) <= motif
            assert len(set(value)) == len(value) <= motif
            if key in table:
                expected[place : place + len(value)] = value
            assert table.setdefault(key, value) == value
        assert expected[-1] == last  # the probe occurred before
        if split == "train":
            assert labels[fill:] == text[1:]
            assert all(x == IGNORE for x in labels[: max(0, fill - 1)])
        else:
            assert labels == [IGNORE] * fill + expected[1:]
    keys = range(1, motif + 1) if split == "train" else [motif]
    assert sizes == {(k, v) for k in keys for v in range(1, motif + 1)}


def test_mad_selective_copying():
    task = make_task("mad_selective_copying", **SIZES, length=30, tokens=6)
    gaps = np.zeros(6)
    for inputs, labels in rows(task, "test"):
        data = [token for token in inputs[:23] if token != 14]
        assert len(data) == 6
        assert all(token < 14 for token in data)
        assert inputs[22] < 14
        assert inputs[23] == 15
        assert inputs[24:] == [14] * 6
        assert labels == [IGNORE] * 24 + data
        places = [place for place in range(23) if inputs[place] != 14]
        gaps += np.diff([-1, *places]) - 1
    np.testing.assert_allclose(gaps / gaps.sum(), 1 / 6, atol=0.06)


def test_mad_compression_and_memorization():
    for inputs, labels in rows(make_task("mad_compression", **SIZES), "test"):
        assert inputs == labels
        assert inputs[-1] == 15
        assert all(token < 15 for token in inputs[:-1])
    task = make_task("mad_memorization", **SIZES)
    other = make_task("mad_memorization", **SIZES, seed=1)
    table, tables = {}, []
    for task in (make_task("mad_memorization", **SIZES), other):
        table = {}
        for split in ("train", "test"):
            for inputs, labels in rows(task, split):
                assert len(inputs) == 32
                assert inputs[1::2] == [255] * 16
                assert labels[::2] == [IGNORE] * 16
                for key, value in zip(inputs[::2], labels[1::2], strict=True):
                    assert 0 <= key < 127 <= value < 255
                    assert table.setdefault(key, value) == value
        assert len(table) == len(set(table.values())) == 127
        tables.append(table)
    assert tables[0] != tables[1]
