"""Tokenizers: bytes, characters, nucleotides, and byte-pair encodings of the library `tokenizers`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.data.cache import data_root, expand
from experiments.data.text.ids import checked_ids, sha256_of
from experiments.data.text.nucleotides import Nucleotides, word_of
from experiments.runs.files import write_atomically

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
LEAST_BPE = 257  # the bytes and the end token
AT_ONCE = 256  # number of texts encoded in one call, which bounds the memory that their tokens take


class Tokenizer(Protocol):
    """A map between text and token ids.

    Attributes:
      vocab_size: number of ids.
      end: id of the end of a document, which no text has.
      bytes_per_token: number of UTF-8 bytes of each id, int32 (vocab_size,); 0 for ids that stand for no text.
      manifest: JSON that identifies the tokenizer; "sha256" covers its vocabulary.
    """

    vocab_size: int
    end: int
    bytes_per_token: np.ndarray
    manifest: dict[str, Any]

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 (n,), without `end`."""
        ...

    def encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Returns the ids of each text, as `encode` gives them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; `end` is left out, and what is not valid UTF-8 becomes U+FFFD."""
        ...


class Bytes:
    """The bytes of UTF-8: ids 0 to 255 are bytes, and 256 is the end of a document; 257 ids."""

    vocab_size = 257
    end = 256

    def __init__(self):
        """Creates the tokenizer."""
        self.bytes_per_token = np.array([1] * 256 + [0], np.int32)
        self.manifest = {"name": "bytes", "vocab_size": self.vocab_size, "sha256": sha256_of("bytes")}

    def encode(self, text: str) -> np.ndarray:
        """Returns the bytes of a text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Returns the bytes of each text."""
        return map(self.encode, texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of bytes."""
        ids = checked_ids(ids, self.vocab_size)
        return bytes(ids[ids != self.end].astype(np.uint8)).decode(errors="replace")


class Characters:
    """The characters of a training text in the order of Unicode, then one id for all others, then the end."""

    def __init__(self, characters: Iterable[str]):
        """Creates the tokenizer of a vocabulary.

        Args:
          characters: the characters, in any order.
        """
        self._characters = np.array(sorted({ord(character) for character in characters}), np.int64)
        count = len(self._characters)
        self.unknown, self.end, self.vocab_size = count, count + 1, count + 2
        text = "".join(map(chr, self._characters))
        self.bytes_per_token = np.array([*(len(character.encode()) for character in text), 0, 0], np.int32)
        self.manifest = {"name": "characters", "vocab_size": self.vocab_size, "sha256": sha256_of(text)}
        self._text = text + "\ufffd"

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of the characters of a text."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
        places = np.searchsorted(self._characters, points)
        known = np.isin(points, self._characters)
        return np.where(known, places, self.unknown).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Returns the ids of the characters of each text."""
        return map(self.encode, texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the characters of ids; those that are not in the vocabulary become U+FFFD."""
        ids = checked_ids(ids, self.vocab_size)
        return "".join(self._text[number] for number in ids[ids != self.end].tolist())


class BytePairs:
    """A byte-level byte-pair encoding, as the library `tokenizers` stores it in a tokenizer.json."""

    def __init__(self, description: str, *, origin: str):
        """Creates the tokenizer of a tokenizer.json.

        Args:
          description: content of the file.
          origin: what the description was read from, for messages.

        Raises:
          ValueError: if it is no byte-level encoding, or has no token for the end of a document.
        """
        library = _library()
        try:
            self._tokenizer = library.Tokenizer.from_str(description)
            decoder = (json.loads(description).get("decoder") or {}).get("type")
        except Exception as error:  # noqa: BLE001  # the library raises no narrower one
            raise ValueError(f"tokenizer={origin!r} is no tokenizer.json: {error}") from None
        if decoder != "ByteLevel":
            raise ValueError(
                f"tokenizer={origin!r} has the decoder {decoder}; expected ByteLevel, whose tokens are bytes"
            )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        end = next((vocabulary[token] for token in END_TOKENS if token in vocabulary), None)
        if end is None:
            raise ValueError(
                f"tokenizer={origin!r} has no token for the end of a document; expected one of {', '.join(END_TOKENS)}"
            )
        self.end, self.vocab_size = end, max(vocabulary.values()) + 1
        self.bytes_per_token = np.zeros(self.vocab_size, np.int32)
        # A byte-level token has one character for each byte; added tokens stand for no text.
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            self.bytes_per_token[number] = len(token)
        self.bytes_per_token[list(self._tokenizer.get_added_tokens_decoder())] = 0
        self.manifest = {"name": "bpe", "vocab_size": self.vocab_size, "sha256": sha256_of(description)}

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Returns the ids of each text; the texts are divided over all cores."""
        for start in range(0, len(texts), AT_ONCE):
            part = list(texts[start : start + AT_ONCE])
            for encoding in self._tokenizer.encode_batch_fast(part, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids."""
        ids = checked_ids(ids, self.vocab_size)
        return self._tokenizer.decode(ids[ids != self.end].tolist(), skip_special_tokens=False)


def make_tokenizer(
    name: str | os.PathLike,
    *,
    texts: Callable[[], Sequence[str]],
    data_dir: str | os.PathLike | None = None,
) -> Tokenizer:
    """Returns the tokenizer of a name or of a tokenizer.json.

    Args:
      name: "bytes"; "characters", those of the training text; "nucleotides" or "nucleotides:6" (see `nucleotides`); "bpe:VOCAB", a
        byte-pair encoding of VOCAB tokens that is trained on the training text and kept in the folder of data sets; or the path of a
        tokenizer.json.
      texts: function that returns the documents of the training split; called for what is trained on them.
      data_dir: folder of data sets; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

    Raises:
      ValueError: if there is no such tokenizer, or the library `tokenizers` is needed and not installed.
    """
    given = os.fspath(name)
    if given == "bytes":
        return Bytes()
    if given == "characters":
        return Characters(set().union(*texts()))
    if (word := word_of(given)) is not None:
        return Nucleotides(word)
    if given.startswith("bpe:"):
        size = given.removeprefix("bpe:")
        if not (size.isascii() and size.isdigit() and int(size) >= LEAST_BPE):
            raise ValueError(
                f"tokenizer={given!r}; expected bpe:VOCAB with a number from {LEAST_BPE}, such as bpe:4096"
            )
        return _trained(int(size), texts(), data_dir)
    if not given.endswith(".json"):
        raise ValueError(
            f"tokenizer={given!r}; expected bytes, characters, nucleotides, bpe:VOCAB or the path of a tokenizer.json"
        )
    try:
        description = expand("tokenizer", given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer={given!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    return BytePairs(description, origin=given)


def _trained(size: int, texts: Sequence[str], data_dir: str | os.PathLike | None) -> BytePairs:
    library = _library()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    root, name = data_root(data_dir), f"bpe-{size}-{digest.hexdigest()[:12]}"
    # Versions up to 0.2.0 left the hash of the content out of the name.
    file: Path | None = next(iter([*sorted(root.glob(f"{name}-*.json")), *root.glob(f"{name}.json")]), None)
    if file is None:
        tokenizer = library.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_TOKENS[0]],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        text = tokenizer.to_str()
        file = root / f"{name}-{sha256_of(text)[:12]}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    content = file.read_bytes()
    if file.stem != name and file.stem != f"{name}-{hashlib.sha256(content).hexdigest()[:12]}":
        raise ValueError(f"{file} is damaged: its name has another hash; delete it, and it is trained again")
    return BytePairs(content.decode(), origin=str(file))


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "byte-pair encodings need the library tokenizers: pip install 'jax-seqmodels[text]'; the tokenizers bytes "
            "and characters need nothing"
        ) from None
    return tokenizers
