"""Ids of bytes and of characters in documents with one label, as the pipelines of Long Range Arena number them.

    bytes        id = byte + 1, 257 ids; documents are cut after `length` bytes (Long Range Arena's own pipeline)
    characters   0 <pad>, 1 <unk>, 2 <eos>, then a table of characters; documents are cut after length - 1 characters and end
                 with <eos> (the pipelines of S4 and S5)

Id 0 is padding in both.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

Vocabulary = Literal["bytes", "characters"]
VOCABULARIES: tuple[Vocabulary, ...] = ("bytes", "characters")
BYTES = ("<pad>", *(f"{byte:#04x}" for byte in range(256)))
SPECIALS = ("<pad>", "<unk>", "<eos>")
UNKNOWN, END = 1, 2
CODE_POINTS = 0x110000
CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A map from texts to ids.

    Attributes:
      vocabulary: the token of each id.
      encode: function from a text to its ids, uint8 (t,). In UTF-8 no byte is above 0xf4, so that ids of bytes fit too.
    """

    vocabulary: tuple[str, ...]
    encode: Callable[[str], np.ndarray]


def check_vocabulary(vocabulary: str) -> None:
    """Raises ValueError unless there is such a vocabulary."""
    if vocabulary not in VOCABULARIES:
        raise ValueError(f"task.vocabulary={vocabulary!r} is unknown; choose from {', '.join(VOCABULARIES)}")


def bytes_encoding(length: int) -> Encoding:
    """Returns the ids of the first `length` bytes of a text in UTF-8."""
    return Encoding(BYTES, lambda text: np.frombuffer(text.encode()[:length], np.uint8) + np.uint8(1))


def characters_encoding(characters: Sequence[str], length: int) -> Encoding:
    """Returns the ids of the first length - 1 characters of a text, in a table of at most 253, and of <eos>."""
    table = np.full(CODE_POINTS, UNKNOWN, np.uint8)
    table[[ord(character) for character in characters]] = np.arange(
        len(SPECIALS), len(SPECIALS) + len(characters), dtype=np.uint8
    )

    def encode(text: str) -> np.ndarray:
        return np.append(table[_code_points(text[: length - 1])], np.uint8(END))

    return Encoding((*SPECIALS, *characters), encode)


def frequent_characters(texts: Iterable[str], *, length: int, least: int, most: int) -> tuple[str, ...]:
    """Returns the `most` most frequent characters that occur `least` times or more, the most frequent first.

    Counted are the first length - 1 characters of each text. Of equally frequent characters the lower code point comes first.
    """
    counts, waiting = np.zeros(CODE_POINTS, np.int64), []
    for text in texts:
        waiting.append(text[: length - 1])
        if len(waiting) == CHUNK:
            counts += np.bincount(_code_points("".join(waiting)), minlength=CODE_POINTS)
            waiting.clear()
    counts += np.bincount(_code_points("".join(waiting)), minlength=CODE_POINTS)
    order = np.argsort(-counts, kind="stable")[:most]
    return tuple(chr(code) for code in order if counts[code] >= least)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
