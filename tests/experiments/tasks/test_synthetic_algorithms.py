"""Copy, parity, sorting and addition against Python's own."""

import numpy as np
import pytest

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


def test_digits_are_uniform():
    task = make_task("addition", **(SIZES | dict(test=4000)), lengths=(1, 1))
    firsts = np.array([inputs[0] for inputs, _ in rows(task, "test")])
    np.testing.assert_allclose(np.bincount(firsts, minlength=10) / 4000, 0.1, atol=0.02)
    task = make_task("addition", **(SIZES | dict(test=4000)), lengths=(3, 3))
    digits = np.array([inputs[:3] for inputs, _ in rows(task, "test")])
    np.testing.assert_allclose(np.bincount(digits[:, 0], minlength=10) / 4000, 0.1, atol=0.02)
    np.testing.assert_allclose(np.bincount(digits[:, 2], minlength=10)[1:] / 4000, 1 / 9, atol=0.02)
    assert np.all(digits[:, 2] > 0)
