"""The recall tasks of MAD: in context, among noise, and of keys and values of several tokens."""

import itertools

import numpy as np

from experiments.tasks.synthetic.associative_recall import random_member
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask
from experiments.tasks.tokens import IGNORE
from layers.options import Count, Fraction, check_integer, checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class InContextRecall(SyntheticTask):
    """MAD's in-context recall and, with noise, its noisy recall (Poli et al. 2024, arXiv:2403.17844).

        k3 v3 k1 v1 k3 v3 ... k1 v1      labels outside training: the values of keys seen before

    A row consists of pairs of a key (uniform over the first half of the vocabulary without noise tokens) and its value
    (of the second half; fixed per key and sequence). The key of the last pair occurred before. In training every next
    token is a label, as in the authors' code.

    Attributes:
      vocab_size: V, number of tokens; the noise tokens are the last.
      length: T, even; a row has T - 1 tokens.
      noise_vocab_size: number of noise tokens.
      noise: probability that two noise tokens replace a pair. One random pair and the last are never noise.
    """

    vocab_size: int = 16
    length: int = 128
    noise_vocab_size: Count = 0
    noise: Fraction = 0.0
    train: int = 12_800
    validation: int = 1280
    test: int = 1280

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, least=4 + self.noise_vocab_size)
        if (self.noise > 0) != (self.noise_vocab_size > 0):
            raise ValueError(
                f"noise={self.noise} with noise_vocab_size={self.noise_vocab_size}; "
                "expected a fraction below 1, and noise tokens just when it is above 0"
            )
        if self.length < 4 or self.length % 2:
            raise ValueError(f"length={self.length}; expected an even number of at least 4")

    def width(self, split: str) -> int:
        return self.length - 1

    @property
    def chance(self) -> float:
        symbols = self.vocab_size - self.noise_vocab_size
        return 1 / (symbols - symbols // 2)

    def make(self, draws: Draws, split: str) -> Arrays:
        symbols, pairs = self.vocab_size - self.noise_vocab_size, self.length // 2 - 1
        half = symbols // 2
        value_of = draws.integers(half, symbols, half)
        keys = draws.integers(0, half, pairs)
        is_pair = draws.uniform(pairs) >= self.noise
        np.put_along_axis(is_pair, draws.integers(0, pairs, 1), True, axis=1)
        probe = random_member(draws, keys, half, is_pair)
        keys, is_pair = np.hstack([keys, probe]), np.pad(is_pair, ((0, 0), (0, 1)), constant_values=True)
        values = np.take_along_axis(value_of, keys, axis=1)
        text = np.stack([keys, values], axis=2)
        if self.noise:
            noise = draws.integers(symbols, self.vocab_size, pairs + 1, 2)
            text = np.where(is_pair[..., None], text, noise)
        text = text.reshape(len(draws), -1)
        labels = text[:, 1:].copy()
        if split != "train":
            labels[:, 1::2] = IGNORE
            labels[:, ::2][~_seen_before(np.where(is_pair, keys, half), half)] = IGNORE
        return {"inputs": text[:, :-1], "labels": labels}


@checked_dataclass(kw_only=True, eq=False)
class NoisyRecall(InContextRecall):
    """MAD's noisy recall, in-context recall with noise tokens between the pairs (Poli et al. 2024, arXiv:2403.17844)."""

    vocab_size: int = 32
    noise_vocab_size: int = 16
    noise: float = 0.2


@checked_dataclass(kw_only=True, eq=False)
class FuzzyRecall(SyntheticTask):
    """MAD's fuzzy recall, keys and values of one to three tokens (Poli et al. 2024, arXiv:2403.17844).

    Keys are ordered choices without repetition from the first half of the symbols, values from the second. Their sizes
    are uniform up to `motif`, but keys outside training always have `motif` tokens. A key has one value per sequence. The
    last pair, the probe, occurred before; rows are filled with the token V - 1 on the left. In training every next token
    is a label, otherwise the values of keys seen before. Unlike in the authors' code, the fill is never a label, and the
    probe always fits before its repetition.

    Attributes:
      vocab_size: V, number of tokens, the fill included.
      length: tokens per row.
      motif: largest number of tokens per key or value.
    """

    vocab_size: int = 16
    length: int = 128
    motif: int = 3
    train: int = 12_800
    validation: int = 1280
    test: int = 1280

    def __post_init__(self) -> None:
        if (self.vocab_size - 1) // 2 < self.motif:
            raise ValueError(f"vocab_size={self.vocab_size}; expected at least {2 * self.motif + 1}")
        check_integer("length", self.length, least=6 * self.motif)

    def width(self, split: str) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    def make(self, draws: Draws, split: str) -> Arrays:
        half = (self.vocab_size - 1) // 2
        train = split == "train"
        key_motifs = _Motifs(np.arange(half), range(1 if train else self.motif, self.motif + 1))
        value_motifs = _Motifs(np.arange(half, self.vocab_size - 1), range(1, self.motif + 1))
        value_of = value_motifs.draw(draws, len(key_motifs))
        probe = key_motifs.draw(draws, 1)[:, 0]
        rows = np.arange(len(draws))
        sizes = (
            key_motifs.sizes[:, None] + value_motifs.sizes[value_of.T]
        )  # size of each pair, by key and row
        probe_size = sizes[probe, rows]
        end = self.length - probe_size - 2 * self.motif  # no pair starts here or later
        place = draws.integers(0, np.minimum(self.length - 2 * probe_size, end)[:, None], 1)[:, 0]
        text = np.full((len(draws), self.length + 3 * 2 * self.motif), self.vocab_size - 1)
        answers = np.zeros(text.shape, bool)
        seen = np.zeros((len(draws), len(key_motifs)), bool)
        at = np.zeros(len(draws), np.int64)

        def write(key: np.ndarray, active: np.ndarray) -> None:
            """Appends a pair to the active rows."""
            nonlocal at
            value = value_of[rows, key]
            start = at
            for motifs, chosen in ((key_motifs, key), (value_motifs, value)):
                for i in range(self.motif):
                    mine = active & (i < motifs.sizes[chosen])
                    text[rows[mine], start[mine] + i] = motifs.tokens[chosen[mine], i]
                    if motifs is value_motifs:
                        answers[rows[mine], start[mine] + i] = seen[rows[mine], key[mine]]
                start = start + np.where(active, motifs.sizes[chosen], 0)
            seen[rows[active], key[active]] = True
            at = start

        keys = key_motifs.draw(draws, self.length // (int(key_motifs.sizes.min()) + 1) + 1)
        for key in keys.T:
            last_chance = at + sizes[key, rows] >= end
            due = ((at >= place) | last_chance) & ~seen[rows, probe]
            write(np.where(due, probe, key), at < end)
        write(probe, np.ones(len(draws), bool))
        columns = (
            np.arange(self.length + 1) - (self.length + 1) + at[:, None]
        )  # the rows shifted to the right
        text = np.where(
            columns >= 0, np.take_along_axis(text, columns % text.shape[1], axis=1), self.vocab_size - 1
        )
        answers = (columns >= 0) & np.take_along_axis(answers, columns % answers.shape[1], axis=1)
        labelled = text[:, 1:] != self.vocab_size - 1 if train else answers[:, 1:]
        return {"inputs": text[:, :-1], "labels": np.where(labelled, text[:, 1:], IGNORE)}


class _Motifs:
    """All ordered choices without repetition, of given sizes, from given symbols.

    Attributes:
      tokens: tokens of each choice, (n, largest size), padded with -1.
      sizes: number of tokens of each choice, (n,).
    """

    def __init__(self, symbols: np.ndarray, sizes: range):
        found = [motif for size in sizes for motif in itertools.permutations(symbols.tolist(), size)]
        self.tokens = np.array([motif + (-1,) * (sizes[-1] - len(motif)) for motif in found])
        self.sizes = np.array([len(motif) for motif in found])
        self._counts = np.array([np.sum(self.sizes == size) for size in sizes])

    def __len__(self) -> int:
        return len(self.sizes)

    def draw(self, draws: Draws, count: int) -> np.ndarray:
        """Returns indices of motifs with uniform sizes, (b, count)."""
        size = draws.integers(0, len(self._counts), count)
        first = np.cumsum(self._counts) - self._counts
        return first[size] + draws.integers(0, self._counts[size], count)


def _seen_before(items: np.ndarray, count: int) -> np.ndarray:
    """Returns whether each number below `count` in a row (b, n) occurred to its left; larger ones never count."""
    hot = items[..., None] == np.arange(count)
    before = np.cumsum(hot, axis=1) - hot > 0
    return np.any(hot & before, axis=2)
