"""Tokens of DNA: single nucleotides, or words of several that do not overlap; and sequences in FASTA files."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from experiments.data.text.ids import checked_ids, sha256_of

NAME = "nucleotides"
BASES, ANY = "ACGT", 4
AMBIGUOUS = "RYSWKMBDHVN"  # IUPAC's letters of several bases
LONGEST_WORD = 8
FASTA = (".fa", ".fasta", ".fna")
PIECE = 131_072  # bases of a document, as the intervals of HyenaDNA (arXiv:2306.15794)


class Nucleotides:
    """Ids 0 to 4 are A, C, G, T and N; then the words of `word` bases, if that is more than 1; then the end of a document.

    Words are those of GENERator (Wu et al. 2025, arXiv:2502.07272), which has 6 bases, and single nucleotides those of HyenaDNA
    (Nguyen et al. 2023, arXiv:2306.15794). A word with an N, and what is left behind the last whole word, are single
    nucleotides. Small letters, which mask repeats, are read as capitals, and letters of several bases as N.
    """

    def __init__(self, word: int = 1):
        """Creates the tokenizer of words of so many bases."""
        self._word = word
        words = itertools.product(BASES, repeat=word) if word > 1 else ()
        self._text = [*BASES, "N", *map("".join, words)]
        self.end = len(self._text)
        self.vocab_size = self.end + 1
        self.bytes_per_token = np.array([*map(len, self._text), 0], np.int32)
        name = NAME if word == 1 else f"{NAME}:{word}"
        self.manifest = {"name": name, "vocab_size": self.vocab_size, "sha256": sha256_of(f"{name} ACGTN")}
        # A word is a number of base 4, its first base the highest digit; A with T, and C with G, sum to 3.
        digits = np.arange(self.end - 5)[:, None] // 4 ** np.arange(word) % 4
        words = 5 + (3 - digits) @ 4 ** np.arange(word)[::-1]
        self._complement = np.array([3, 2, 1, 0, ANY, *words, self.end], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a sequence.

        Raises:
          ValueError: a character is no letter of DNA.
        """
        codes = LETTERS[np.minimum(np.frombuffer(text.encode("utf-32-le"), np.uint32), len(LETTERS) - 1)]
        if (wrong := np.flatnonzero(codes < 0)).size:
            place = int(wrong[0])
            raise ValueError(
                f"tokenizer={self.manifest['name']!r}: character {place} of a sequence is {text[place]!r}; expected A, C, G, T, N or "
                f"one of {AMBIGUOUS}"
            )
        if self._word == 1:
            return codes.astype(np.int32)
        count = len(codes) // self._word
        rows = codes[: count * self._word].reshape(count, self._word).astype(np.int32)
        whole = np.all(rows != ANY, axis=1)
        words = 5 + rows @ 4 ** np.arange(self._word)[::-1]
        kept = ~whole[:, None] | (np.arange(self._word) == 0)
        rows[:, 0] = np.where(whole, words, rows[:, 0])
        return np.concatenate([rows[kept], codes[count * self._word :]]).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Returns the ids of each sequence."""
        return map(self.encode, texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the sequence of ids."""
        ids = checked_ids(ids, self.vocab_size)
        return "".join(self._text[number] for number in ids[ids != self.end].tolist())

    def reverse_complement(self, ids: Iterable[int]) -> np.ndarray:
        """Returns the ids of the other strand, read in its direction: reversed, with A for T and C for G."""
        return self._complement[checked_ids(ids, self.vocab_size)[::-1]]


def _letters() -> np.ndarray:
    """Returns the id of each character below 129, and -1 for what is no letter of DNA and for all others, in the last place."""
    table = np.full(129, -1, np.int8)
    for number, letters in enumerate((*BASES, AMBIGUOUS)):
        for letter in letters:
            table[[ord(letter), ord(letter.lower())]] = number
    return table


LETTERS = _letters()


def word_of(name: str) -> int | None:
    """Returns the number of bases of a word of "nucleotides" or "nucleotides:6"; None for other tokenizers.

    Raises:
      ValueError: the number is none from 2 to 8.
    """
    if name == NAME:
        return 1
    if not name.startswith(f"{NAME}:"):
        return None
    word = name.removeprefix(f"{NAME}:")
    if not re.fullmatch(rf"[2-{LONGEST_WORD}]", word):
        raise ValueError(
            f"tokenizer={name!r}; expected {NAME}, or {NAME}:WORD with a number from 2 to {LONGEST_WORD}, such as {NAME}:6"
        )
    return int(word)


def read_fasta(text: str, name: str) -> Iterator[str]:
    """Yields the sequences of a FASTA file, the longer ones in pieces of 131,072 bases.

    Raises:
      ValueError: the file does not begin with a header.
    """
    head, *records = re.split(r"^>", text, flags=re.MULTILINE)
    if head.strip():
        raise ValueError(f"source: {name} begins with {head.strip()[:20]!r}; expected FASTA, '>' and a name")
    for record in records:
        sequence = "".join(record.partition("\n")[2].split())
        for start in range(0, len(sequence), PIECE):
            yield sequence[start : start + PIECE]
