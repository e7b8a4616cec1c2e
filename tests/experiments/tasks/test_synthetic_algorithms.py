"""Copy, parity, sorting, addition, counting and the mode against Python's own."""

import numpy as np
import pytest
from scipy.spatial import ConvexHull

from experiments.tasks import make_task
from experiments.tasks.tokens import IGNORE

SIZES = dict(train=300, validation=20, test=200)


def rows(task, split):
    """Inputs and labels of every row without padding."""
    source = task.splits[split]
    data = source.gather(np.arange(len(source)), int(source.lengths.max()))
    for inputs, labels, length in zip(data["inputs"], data["labels"], source.lengths, strict=True):
        yield inputs[:length].tolist(), labels[:length].tolist()


def cut(tokens, sign):
    place = tokens.index(sign)
    return tokens[:place], tokens[place + 1 :]


@pytest.mark.parametrize("name, solve", [("copy", list), ("sorting", sorted)])
@pytest.mark.parametrize("split", ["train", "test", "length_9"])
def test_copy_and_sorting(name, solve, split):
    task = make_task(name, **SIZES, symbols=7, lengths=(2, 6), extrapolate=(9,))
    seen = set()
    for inputs, labels in rows(task, split):
        given, answer = cut(inputs, 7)
        assert all(0 <= token < 7 for token in given)
        assert answer == solve(given)
        assert labels == [IGNORE] * len(given) + answer + [8]
        seen.add(len(given))
    assert seen == ({9} if split == "length_9" else {2, 3, 4, 5, 6})


@pytest.mark.parametrize("name, solve", [("copy_source", list), ("sorting_source", sorted)])
@pytest.mark.parametrize("split", ["train", "length_9"])
def test_copy_and_sorting_from_a_source(name, solve, split):
    task = make_task(name, **SIZES, symbols=7, lengths=(2, 6), extrapolate=(9,))
    source = task.splits[split]
    width = int(source.lengths.max()) + 2
    data = source.gather(np.arange(len(source)), width)
    assert data["inputs"].shape == data["segment_ids"].shape == (len(source), 2, width)
    for (given, target), (there, here), labels in zip(
        data["inputs"], data["segment_ids"] == 1, data["labels"], strict=True
    ):
        answer = solve(given[there].tolist())
        assert target[here].tolist() == [7, *answer]
        assert labels.tolist() == [*answer, 8] + [IGNORE] * (width - len(answer) - 1)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("split", ["train", "test", "length_12"])
def test_parity(running, split):
    task = make_task("parity", **SIZES, running=running, lengths=(3, 6), extrapolate=(12,))
    seen, ones = set(), 0
    for bits, labels in rows(task, split):
        so_far = [sum(bits[: place + 1]) % 2 for place in range(len(bits))]
        assert labels == (so_far if running else [IGNORE] * (len(bits) - 1) + so_far[-1:])
        seen.add(len(bits))
        ones += sum(bits) / len(bits)
    assert seen == ({12} if split == "length_12" else {3, 4, 5, 6})
    assert ones / SIZES.get(split, 200) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("split", ["train", "test", "length_7"])
def test_addition(reverse, split):
    task = make_task("addition", **SIZES, reverse=reverse, lengths=(1, 4), extrapolate=(4, 7))
    turn = -1 if reverse else 1
    seen = set()
    for inputs, labels in rows(task, split):
        first, rest = cut(inputs, 10)
        second, answer = cut(rest, 11)
        numbers = ["".join(map(str, digits[::turn])) for digits in (first, second, answer)]
        assert all(str(int(number)) == number for number in numbers)  # no leading zeros
        assert int(numbers[0]) + int(numbers[1]) == int(numbers[2])
        assert labels == [IGNORE] * (len(first) + len(second) + 1) + answer + [12]
        seen.add((len(first), len(second)))
    if split == "length_7":
        assert seen == {(7, n) for n in range(1, 8)} | {(n, 7) for n in range(1, 8)}
    else:
        assert seen == {(a, b) for a in range(1, 5) for b in range(1, 5)}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("split", ["train", "length_7"])
def test_addition_with_hints(reverse, split):
    """Letters are those of places of value, follow each other, and begin anywhere."""
    task = make_task("addition_hints", **SIZES, reverse=reverse, lengths=(1, 4), extrapolate=(7,), letters=9)
    turn = -1 if reverse else 1
    starts = set()
    for inputs, labels in rows(task, split):
        first, rest = cut(inputs, 10)
        second, answer = cut(rest, 11)
        assert labels == [IGNORE] * (len(first) + len(second) + 1) + answer + [12]
        numbers, units = [], set()
        for tokens in (first, second, answer):
            letters, digits = tokens[::2][::turn], tokens[1::2][::turn]
            assert letters == list(range(letters[0], letters[0] - len(letters), -1))
            assert letters[-1] >= 13
            assert letters[0] < task.vocab_size
            units.add(letters[-1])
            numbers.append("".join(map(str, digits)))
        assert all(str(int(number)) == number for number in numbers)
        assert int(numbers[0]) + int(numbers[1]) == int(numbers[2])
        assert len(units) == 1
        starts |= units
    assert starts >= ({13, 14} if split == "length_7" else set(range(13, 18)))


@pytest.mark.parametrize("split", ["train", "test", "length_9"])
def test_sorting_with_hints(split):
    task = make_task("sorting_hints", **SIZES, symbols=7, lengths=(1, 6), extrapolate=(9,))
    hinted, lasts = 0, 0
    for inputs, labels in rows(task, split):
        (kind, *given), answer = cut(inputs, 7)
        assert labels == [IGNORE] * (len(given) + 1) + answer + [8]
        if kind == 9:
            assert answer == sorted(given)
        else:
            assert kind == 10
            *given, asked = given
            assert asked in given
            assert answer == sorted(symbol for symbol in set(given) if symbol > asked)[:1]
            hinted, lasts = hinted + 1, lasts + (not answer)
    assert hinted == 0 if split != "train" else 0.4 < hinted / 300 < 0.6 and 0 < lasts < hinted


@pytest.mark.parametrize("split", ["train", "length_9"])
def test_tasks_with_short_programs(split):
    options = dict(**SIZES, lengths=(1, 6), extrapolate=(9,))
    seen, firsts = set(), set()
    for inputs, labels in rows(make_task("copy_unique", **options, symbols=9), split):
        given, answer = cut(inputs, 9)
        assert answer == given
        assert len(set(given)) == len(given)
        assert labels == [IGNORE] * len(given) + answer + [10]
        seen.add(len(given))
    assert seen == ({9} if split == "length_9" else {1, 2, 3, 4, 5, 6})
    for inputs, labels in rows(make_task("count", **options, numbers=12), split):
        (first, last), answer = cut(inputs, 12)
        assert answer == list(range(first, last + 1))
        assert labels == [IGNORE, IGNORE, *answer, 13]
        firsts.add((first, len(answer)))
    lengths = {9} if split == "length_9" else range(1, 7)
    assert firsts == {(first, length) for length in lengths for first in range(13 - length)}
    modes = set()
    for inputs, labels in rows(make_task("mode", **options, symbols=8, drawn=3), split):
        given, answer = cut(inputs, 8)
        counts = sorted(((given.count(symbol), symbol) for symbol in set(given)), reverse=True)
        assert answer == [counts[0][1]]
        assert len(counts) <= 3
        assert len(counts) == 1 or counts[0][0] > counts[1][0]
        assert labels == [IGNORE] * len(given) + answer + [9]
        modes |= set(answer)
    assert modes == set(range(8))


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("copy_unique", dict(symbols=8), "symbols=8 with strings of 9 distinct symbols; expected at least 9"),
        ("count", dict(numbers=8), "numbers=8 with 9 to count; expected at least 9"),
        ("mode", dict(symbols=4), "drawn=5 of symbols=4; expected at most 4"),
        ("addition_hints", dict(letters=9), "letters=9 with sums of up to 10 digits; expected at least 10"),
        ("sorting_hints", dict(hinted=1.5), "hinted=1.5; expected"),
    ],
)
def test_too_few(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_task(name, lengths=(1, 6), extrapolate=(9,), **options)


def test_digits_are_uniform():
    task = make_task("addition", **(SIZES | dict(test=4000)), lengths=(1, 1))
    firsts = np.array([inputs[0] for inputs, _ in rows(task, "test")])
    np.testing.assert_allclose(np.bincount(firsts, minlength=10) / 4000, 0.1, atol=0.02)
    task = make_task("addition", **(SIZES | dict(test=4000)), lengths=(3, 3))
    digits = np.array([inputs[:3] for inputs, _ in rows(task, "test")])
    np.testing.assert_allclose(np.bincount(digits[:, 0], minlength=10) / 4000, 0.1, atol=0.02)
    np.testing.assert_allclose(np.bincount(digits[:, 2], minlength=10)[1:] / 4000, 1 / 9, atol=0.02)
    assert np.all(digits[:, 2] > 0)


def hull(points):
    """The corners counter-clockwise from the first, by SciPy."""
    corners = ConvexHull(points).vertices.tolist()
    start = corners.index(min(corners))
    return corners[start:] + corners[:start]


@pytest.mark.parametrize(
    "name, solve",
    [("sorting_pointers", lambda points: np.argsort(points[:, 0]).tolist()), ("convex_hull", hull)],
)
@pytest.mark.parametrize("split", ["train", "length_9"])
def test_pointers_name_sorted_numbers_and_corners(name, solve, split):
    task = make_task(name, **SIZES, lengths=(3, 6), extrapolate=(9,))
    source = task.splits[split]
    width = int(source.lengths.max()) + 2
    data = source.gather(np.arange(len(source)), width)
    assert data["inputs"].shape == (len(source), 2, width, task.input_size)
    for (given, target), (there, here), labels in zip(
        data["inputs"], data["segment_ids"] == 1, data["labels"], strict=True
    ):
        answer = [item + 1 for item in solve(given[there])]
        assert there.sum() in ([9] if split == "length_9" else [3, 4, 5, 6])
        assert target[here, 0].tolist() == [0, *answer]
        assert labels.tolist() == [*answer, 0] + [IGNORE] * (width - len(answer) - 1)
