"""Word problems of groups against products of permutation matrices and sums."""

import itertools
import math

import numpy as np
import pytest

from experiments.tasks import make_task
from experiments.tasks.synthetic.word_problem import inputs, products
from experiments.tasks.tokens import IGNORE

SIZES = dict(train=60, validation=10, test=40, lengths=(2, 9), extrapolate=(14,))


def matrices(group):
    """The permutation matrices of a group, in the order of their ids."""
    number = int(group[1:])
    eye = np.eye(number, dtype=np.int64)
    # Column i of a matrix is where i goes.
    found = [eye[:, list(order)] for order in itertools.permutations(range(number))]
    return [m for m in found if group[0] == "S" or round(np.linalg.det(m)) == 1]


@pytest.mark.parametrize("group, order", [("S3", 6), ("S5", 120), ("A4", 12), ("A5", 60)])
def test_products_are_those_of_matrices(group, order):
    elements = matrices(group)
    ids = {m.tobytes(): place for place, m in enumerate(elements)}
    table = products(group)
    assert table.shape == (order, order)
    for a, b in np.random.default_rng(0).integers(0, order, (200, 2)):
        assert table[a, b] == ids[(elements[a] @ elements[b]).tobytes()]


@pytest.mark.parametrize("split", ["train", "test", "length_14"])
@pytest.mark.parametrize("group, moved", [("S4", None), ("S4", 2), ("A4", 3), ("Z7", None)])
def test_labels_are_the_products_so_far(group, moved, split):
    task = make_task("word_problem", group=group, moved=moved, **SIZES)
    rows = task.splits[split]
    data = rows.gather(np.arange(len(rows)), int(rows.lengths.max()))
    given = set()
    for tokens, labels, length in zip(data["inputs"], data["labels"], rows.lengths, strict=True):
        assert np.all(labels[length:] == IGNORE)
        assert np.all(tokens[length:] == 0)
        tokens, labels = tokens[:length].tolist(), labels[:length].tolist()
        given |= set(tokens)
        if group == "Z7":
            assert labels == [sum(tokens[: n + 1]) % 7 for n in range(length)]
            continue
        elements, state = matrices(group), np.eye(4, dtype=np.int64)
        for token, label in zip(tokens, labels, strict=True):
            state = elements[token] @ state
            assert np.array_equal(elements[label], state)
    allowed = range(7) if group == "Z7" else inputs(group, moved)
    assert given == set(map(int, allowed))
    assert task.chance == 1 / task.vocab_size


def test_inputs_move_few_elements():
    swaps = [matrices("S5")[place] for place in inputs("S5", 2)]
    assert len(swaps) == 1 + math.comb(5, 2)
    assert all(np.trace(m) >= 3 for m in swaps)
    assert len(inputs("S5", 3)) == 11 + 2 * math.comb(5, 3)
    assert len(inputs("A5", 3)) == 1 + 2 * math.comb(5, 3)
    assert len(inputs("S5", 5)) == len(inputs("S5", None)) == 120


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(group="D4"), "group='D4'; expected one of Z2 to Z1000, S2 to S6, A3 to A6"),
        (dict(group="S9"), "group='S9'; expected one of"),
        (dict(group="Z1"), "group='Z1'; expected one of"),
        (dict(group="Z60", moved=2), "moved=2 with group='Z60'; it is for permutations, S or A"),
        (dict(group="S5", moved=6), "moved=6; expected a number from 2 to 5, or None for all of S5"),
        (dict(group="A5", moved=2), "moved=2; expected a number from 3 to 5"),
    ],
)
def test_groups_that_are_none(options, said):
    with pytest.raises(ValueError, match=said):
        make_task("word_problem", **options)
