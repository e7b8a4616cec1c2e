"""In-context learning of regular languages: continuing the words of an automaton that only the sequence defines."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.synthetic.draws import GOLDEN, Draws, mix
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask
from experiments.tasks.tokens import IGNORE, cross_entropy, is_counted
from layers.options import Bound, checked_dataclass
from layers.typing import Array, Float

PARTS = {"validation": 0, "test": 1}  # indices out of 16 parts of all languages; training has the others
EDGES = 3


class Automata(NamedTuple):
    """One deterministic automaton per row; every state accepts and state 0 is the start.

    Attributes:
      symbols: tokens of the outgoing edges, (b, states, EDGES).
      targets: states that the edges lead to, (b, states, EDGES).
      edges: number of outgoing edges, (b, states).
    """

    symbols: np.ndarray
    targets: np.ndarray
    edges: np.ndarray


@checked_dataclass(kw_only=True, eq=False)
class RegularLanguages(SyntheticTask):
    """In-context learning of regular languages (Akyürek et al. 2024, arXiv:2401.12973).

        a c a b | a c | a b a c ...      labels: the next letter; none where a word ends

    Each sequence has its own automaton of 4 to 12 states. A state has 1 to 3 outgoing edges with distinct letters, out of
    the automaton's alphabet of 4 to 18 letters, to distinct other states. Words are random walks from the start, and end
    after a random number of letters. Evaluation languages do not occur in training: a hash of the language, not of its
    description, decides the split. The letters are ids 0 .. letters - 1 and "|" the next.

    The task has two more metrics: `dfa_accuracy`, the fraction of likeliest letters that the automaton allows, and
    `total_variation` between the predicted and the true distribution of the next letter.

    Attributes:
      letters: number of letters of all languages.
      states: smallest and largest number of states.
      words: smallest and largest number of words per sequence.
      word_length: smallest and largest number of letters per word.
    """

    ragged = True

    letters: Annotated[int, Bound(least=4, most=31)] = 18
    states: tuple[int, int] = (4, 12)
    words: tuple[int, int] = (10, 19)
    word_length: tuple[int, int] = (1, 49)
    train: int = 5000
    validation: int = 250
    test: int = 250

    def __post_init__(self) -> None:
        for name, least in (("states", 4), ("words", 1), ("word_length", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ValueError(f"{name}={(low, high)}; expected least and most, from {least} on")

    @property
    def vocab_size(self) -> int:
        """Number of letters and the sign between words."""
        return self.letters + 1

    def width(self, split: str) -> int:
        return self.words[1] * (self.word_length[1] + 1) - 2

    @property
    def chance(self) -> float:
        return 1 / self.letters

    def make(self, draws: Draws, split: str) -> Arrays:
        automata = self.automata(draws.child(0), split)
        draws = draws.child(1)
        width = self.width(split) + 1
        words = draws.integers(self.words[0], self.words[1] + 1, 1)
        sizes = draws.integers(self.word_length[0], self.word_length[1] + 1, self.words[1])
        ends = np.cumsum(sizes + 1, axis=1) - 1  # the place of the sign after each word
        lengths = np.take_along_axis(ends, words - 1, axis=1)
        is_sign = np.zeros((len(draws), width + 1), bool)
        np.put_along_axis(is_sign, ends, True, axis=1)
        choice = draws.uniform(width)
        allowed = np.sum(
            np.where(np.arange(EDGES) < automata.edges[..., None], 1 << automata.symbols, 0), axis=2
        )
        rows, state = np.arange(len(draws)), np.zeros(len(draws), np.int64)
        text, legal = np.zeros((2, len(draws), width), np.int64)
        for t in range(width):
            edge = (choice[:, t] * automata.edges[rows, state]).astype(np.int64)
            sign = is_sign[:, t]
            text[:, t] = np.where(sign, self.letters, automata.symbols[rows, state, edge])
            legal[:, t] = np.where(sign, 0, allowed[rows, state])
            state = np.where(sign, 0, automata.targets[rows, state, edge])
        inside = np.arange(width) < lengths
        text, legal = np.where(inside, text, 0), np.where(inside, legal, 0)
        return {
            "inputs": np.where(inside[:, 1:], text[:, :-1], 0),
            "labels": np.where(legal[:, 1:] > 0, text[:, 1:], IGNORE),
            "legal": legal[:, 1:],
            "lengths": lengths[:, 0] - 1,
        }

    def automata(self, draws: Draws, split: str) -> Automata:
        """Returns the automaton of each row: the first random one whose language belongs to the split."""
        attempt = 0
        chosen = self._random(draws.child(attempt))
        wrong = ~_belongs(chosen, split)
        while np.any(wrong):
            attempt += 1
            fresh = self._random(draws.child(attempt))
            chosen = Automata(
                *(
                    np.where(wrong.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                    for old, new in zip(chosen, fresh, strict=True)
                )
            )
            wrong = ~_belongs(chosen, split)
        return chosen

    def _random(self, draws: Draws) -> Automata:
        most = self.states[1]
        states = draws.integers(self.states[0], most + 1, 1)
        alphabet_size = draws.integers(4, self.letters + 1, 1)
        alphabet = draws.order(self.letters)
        places = draws.distinct(alphabet_size, EDGES, most)
        symbols = np.take_along_axis(alphabet, places.reshape(len(draws), -1), axis=1).reshape(places.shape)
        targets = draws.distinct(states - 1, EDGES, most)
        targets += targets >= np.arange(most)[:, None]  # the state itself is left out
        return Automata(symbols, targets, draws.integers(1, EDGES + 1, most))

    def loss(
        self, outputs: Float[Array, "b t v"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss over labels, and sums including those of the two further metrics."""
        mean, sums = cross_entropy(outputs, batch)
        counted = is_counted(batch)
        legal = (batch["legal"][..., None] >> jnp.arange(outputs.shape[-1])[None, None]) & 1
        legal = jnp.where(counted[..., None], legal, 0).astype(jnp.float32)
        true = legal / jnp.maximum(legal.sum(-1, keepdims=True), 1.0)
        predicted = jax.nn.softmax(jnp.where(counted[..., None], outputs.astype(jnp.float32), 0.0))
        best = jnp.argmax(predicted, axis=-1)
        hits = jnp.take_along_axis(legal, best[..., None], axis=-1)[..., 0]
        distance = 0.5 * jnp.abs(predicted - true).sum(-1)
        return mean, sums | {
            "dfa_accuracy": jnp.sum(hits, where=counted),
            "total_variation": jnp.sum(distance, where=counted),
        }

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the accuracies of guessing, and of a predictor that knows the automaton and its state."""
        rows = self.splits[split]
        legal = rows.gather(np.arange(len(rows)), self.width(split))["legal"]
        letters = np.bitwise_count(legal[legal > 0])
        return super().baselines(split) | {"automaton": float(np.mean(1 / letters))}


def language_hash(automata: Automata) -> np.ndarray:
    """Returns a hash (b,) of the language of each automaton, equal for automata that accept the same words.

    The hash of a state is refined from its edges, whose order does not count:
    h_0 = 1, h_{n+1}(s) = mix(sum over edges of mix(symbol + mix(h_n(target)))). Two automata of n states that differ
    do so on a word shorter than 2n, so 2n rounds tell them apart.
    """
    states = automata.edges.shape[1]
    rows = np.arange(len(automata.edges))[:, None, None]
    there = np.arange(EDGES) < automata.edges[..., None]
    hashes = np.ones(automata.edges.shape, np.uint64)
    for _ in range(2 * states):
        edges = mix(automata.symbols.astype(np.uint64) * GOLDEN + mix(hashes[rows, automata.targets]))
        hashes = mix(np.sum(np.where(there, edges, np.uint64(0)), axis=2, dtype=np.uint64))
    return hashes[:, 0]


def _belongs(automata: Automata, split: str) -> np.ndarray:
    part = (language_hash(automata) % np.uint64(16)).astype(np.int64)
    return part == PARTS[split] if split in PARTS else ~np.isin(part, list(PARTS.values()))
