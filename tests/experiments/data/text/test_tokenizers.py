"""Tokenizers: text comes back, and ids mean what they say."""

import sys

import numpy as np
import pytest

from experiments.data.text.tokenizers import Bytes, Characters, make_tokenizer

TEXT = "def naïve(x):\n\treturn '日本' + x  # 🐍\n"


def never():
    raise AssertionError("the text was read")


def test_bytes():
    bytes_ = make_tokenizer("bytes", texts=never)
    ids = bytes_.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(TEXT.encode())
    assert bytes_.decode([*ids, bytes_.end]) == TEXT
    assert (bytes_.vocab_size, bytes_.end) == (257, 256)
    assert bytes_.decode([65, 0xC3, 66, 0xFF]) == "A\ufffdB\ufffd"
    with pytest.raises(ValueError, match="ids from 3 to 257; expected 0 to 256"):
        bytes_.decode([3, 257])


def test_characters():
    characters = make_tokenizer("characters", texts=lambda: ["ba", "é🐍"])
    assert characters.encode("abé🐍").tolist() == [0, 1, 2, 3]
    assert characters.decode([1, 0, characters.end, 3]) == "ba🐍"
    assert characters.encode("azA\U0010ffff").tolist() == [0, characters.unknown, characters.unknown, 4]
    assert characters.decode(characters.encode("az")) == "a\ufffd"
    assert characters.vocab_size == 6
    assert characters.bytes_per_token.tolist() == [1, 1, 2, 4, 0, 0]


def test_manifests_tell_vocabularies_apart():
    manifests = [Bytes().manifest, Characters("abc").manifest, Characters("abd").manifest]
    assert len({manifest["sha256"] for manifest in manifests}) == 3
    assert Characters("cab").manifest == Characters("abc").manifest


@pytest.mark.parametrize("name", ["byte", "bpe:256", "bpe:x", "bpe:-300"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"tokenizer='{name}'; expected"):
        make_tokenizer(name, texts=never)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json' cannot be read: No such file"):
        make_tokenizer(tmp_path / "none.json", texts=never)


def test_byte_pairs_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"jax-seqmodels\[text\]"):
        make_tokenizer("bpe:300", texts=lambda: [TEXT])
