"""Regular languages: automata, words, labels and metrics against a walk through dictionaries."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import make_task
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.regular_languages import Automata, language_hash
from experiments.tasks.tokens import IGNORE

SIZES = dict(train=60, validation=20, test=40)


@pytest.fixture(scope="module")
def task():
    return make_task("regular_languages", **SIZES, words=(3, 6), word_length=(1, 8))


def automata_of(task, split):
    source = task.splits[split]
    return task.automata(Draws(source._key, np.arange(len(source))).child(0), split)


def as_dictionaries(automata, row):
    """For each state its symbols and where they lead."""
    return [
        {
            int(automata.symbols[row, state, edge]): int(automata.targets[row, state, edge])
            for edge in range(automata.edges[row, state])
        }
        for state in range(automata.edges.shape[1])
    ]


def words_of(automaton, longest):
    """All words up to a length."""
    found, frontier = {()}, {(): 0}
    for _ in range(longest):
        frontier = {(*word, s): to for word, state in frontier.items() for s, to in automaton[state].items()}
        found |= frontier.keys()
    return found


def test_automata_are_as_described(task):
    automata = automata_of(task, "train")
    counts, sizes = set(), set()
    for row in range(60):
        automaton = as_dictionaries(automata, row)
        reached = {0}
        for _ in automaton:
            reached |= {to for state in reached for to in automaton[state].values()}
        for state in reached:
            edges = automata.edges[row, state]
            targets = list(automaton[state].values())
            assert len(automaton[state]) == edges == len(set(targets))
            assert state not in targets
            counts.add(int(edges))
        sizes.add(len(reached))
        assert max(reached) < 12
    assert counts == {1, 2, 3}
    assert max(sizes) > 8


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_words_labels_and_legal_letters(task, split):
    source = task.splits[split]
    automata = automata_of(task, split)
    data = source.gather(np.arange(len(source)), int(source.lengths.max()))
    for row, length in enumerate(source.lengths):
        automaton = as_dictionaries(automata, row)
        inputs, labels, legal = (data[name][row, :length].tolist() for name in ("inputs", "labels", "legal"))
        state, words = 0, 1
        for place, token in enumerate(inputs):
            if token == 18:
                state, words = 0, words + 1
            else:
                state = automaton[state][token]
            if labels[place] == IGNORE:
                assert legal[place] == 0
                assert place + 1 < length
                assert inputs[place + 1] == 18
                continue
            assert legal[place] == sum(1 << letter for letter in automaton[state])
            assert labels[place] in automaton[state]
            assert place + 1 == length or labels[place] == inputs[place + 1]
        assert 3 <= words <= 6
    lengths = [
        len(list(g)) for row in data["inputs"] for k, g in itertools.groupby(row, lambda x: x == 18) if not k
    ]
    assert min(lengths) == 1


def test_the_hash_is_that_of_the_language():
    """Equal for other names of states and edges, different for other languages; and the splits have their own."""
    a = Automata(
        np.array([[[3, 5, 0], [4, 0, 0], [6, 0, 0], [1, 2, 9]]]),
        np.array([[[1, 2, 0], [0, 0, 0], [0, 0, 0], [3, 3, 3]]]),
        np.array([[2, 1, 1, 3]]),
    )
    renamed = Automata(
        np.array([[[5, 3, 7], [7, 7, 7], [4, 1, 1], [6, 8, 8]]]),
        np.array([[[3, 2, 1], [1, 1, 1], [0, 3, 3], [0, 0, 0]]]),
        np.array([[2, 3, 1, 1]]),
    )
    unrolled = Automata(  # state 2 does what the start does
        np.array([[[3, 5, 0], [4, 0, 0], [3, 5, 0], [6, 0, 0]]]),
        np.array([[[1, 3, 0], [2, 0, 0], [1, 3, 0], [0, 0, 0]]]),
        np.array([[2, 1, 2, 1]]),
    )
    other = a._replace(targets=np.array([[[1, 2, 0], [2, 0, 0], [0, 0, 0], [3, 3, 3]]]))
    assert words_of(as_dictionaries(a, 0), 7) == words_of(as_dictionaries(unrolled, 0), 7)
    hashes = [int(language_hash(x)[0]) for x in (a, renamed, unrolled, other)]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_no_language_is_in_two_splits():
    """With few letters and states many languages come again, but never in another split."""
    task = make_task("regular_languages", letters=4, states=(4, 4), train=1000, validation=200, test=200)
    automata = {split: automata_of(task, split) for split in task.splits}
    found = {split: {int(h) for h in language_hash(a)} for split, a in automata.items()}
    assert len(found["train"]) < 1000
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    words = [
        {frozenset(words_of(as_dictionaries(automata[split], row), 7)) for row in range(60)}
        for split in ("train", "test")
    ]
    assert not words[0] & words[1]


def test_metrics(task):
    """Who gives all allowed letters the same probability makes no mistake; guessing makes those it must."""
    source = task.splits["test"]
    batch = source.gather(np.arange(40), int(source.lengths.max())) | {"weight": np.ones(40, np.float32)}
    allowed = (batch["legal"][..., None] >> np.arange(19)) & 1
    sums = task.loss(jnp.where(allowed, 0.0, -30.0), batch)[1]
    count = np.sum(batch["labels"] != IGNORE)
    assert sums["count"] == sums["dfa_accuracy"] == count
    assert sums["total_variation"] == pytest.approx(0, abs=1e-3)
    guess = task.loss(jnp.zeros((*batch["labels"].shape, 19)), batch)[1]
    letters = allowed.sum(-1)[batch["labels"] != IGNORE]
    assert guess["total_variation"] == pytest.approx(np.sum(1 - letters / 19), rel=1e-4)
    assert guess["dfa_accuracy"] == np.sum(allowed[..., 0][batch["labels"] != IGNORE])
    baselines = task.baselines("test")
    assert baselines["automaton"] == pytest.approx(np.mean(1 / letters))
    assert sums["loss"] / count == pytest.approx(np.mean(np.log(letters)), rel=1e-3)
