"""Byte-pair encodings of the library `tokenizers`, which comes with the optional group `parity`."""

import shutil

import numpy as np
import pytest

from experiments.data.text import tokenizers
from experiments.data.text.datasets import load_corpus
from experiments.data.text.tokenizers import make_tokenizer

TEXT = "def naïve(x):\n\treturn '日本' + x  # 🐍\n"


def never():
    raise AssertionError("the text was read")


def test_byte_pairs(tmp_path):
    texts = [TEXT * 20, "return naïve " * 50]
    pairs = make_tokenizer("bpe:300", texts=lambda: texts, data_dir=tmp_path)
    ids = pairs.encode(TEXT)
    assert pairs.decode([*ids, pairs.end]) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert pairs.bytes_per_token[ids].sum() == len(TEXT.encode())
    assert pairs.bytes_per_token[pairs.end] == 0
    (file,) = tmp_path.glob("*.json")
    again = make_tokenizer(file, texts=never)
    assert again.manifest == pairs.manifest
    assert pairs.vocab_size <= 300
    text = file.read_text()
    file.write_text(text.replace("'", "`", 1))
    with pytest.raises(ValueError, match=r"is damaged: .*; delete it, and it is trained again"):
        make_tokenizer("bpe:300", texts=lambda: texts, data_dir=tmp_path)
    file.unlink()
    assert make_tokenizer("bpe:300", texts=lambda: texts, data_dir=tmp_path).manifest == pairs.manifest
    assert file.read_text() == text
    file.rename(tmp_path / f"{file.stem.rpartition('-')[0]}.json")  # as versions up to 0.2.0 named it
    assert make_tokenizer("bpe:300", texts=lambda: texts, data_dir=tmp_path).manifest == pairs.manifest
    file.write_text(text)
    file.write_text(file.read_text().replace("<|endoftext|>", "<nothing>"))
    with pytest.raises(ValueError, match="has no token for the end of a document"):
        make_tokenizer(file, texts=never)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        make_tokenizer(file, texts=never)


def test_many_texts_give_what_each_gives(tmp_path, monkeypatch):
    texts = [TEXT * count for count in range(1, 8)]
    pairs = make_tokenizer("bpe:300", texts=lambda: texts, data_dir=tmp_path)
    monkeypatch.setattr(tokenizers, "AT_ONCE", 3)
    found = list(pairs.encode_all(texts))
    assert len(found) == len(texts)
    for text, ids in zip(texts, found, strict=True):
        np.testing.assert_array_equal(ids, pairs.encode(text))


def test_a_prepared_corpus_has_its_tokenizer_beside_it(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(200):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"é{number} " * (number % 7 + 1), encoding="utf-8")
    corpus = load_corpus(tmp_path / "texts", tokenizer="bpe:3000", data_dir=tmp_path / "data")
    assert corpus.tokenizer.vocab_size < 3000
    copied = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    folder, (file,) = copied / corpus.dataset.folder.name, copied.glob("*.json")
    for tokenizer in ("bpe:3000", file):
        found = load_corpus(folder, tokenizer=tokenizer)
        assert found.dataset.manifest == corpus.dataset.manifest
        assert found.tokenizer.manifest == corpus.tokenizer.manifest
    other = make_tokenizer("bpe:300", texts=lambda: ["another text"], data_dir=tmp_path / "other")
    (wrong,) = (tmp_path / "other").glob("*.json")
    assert other.manifest != corpus.tokenizer.manifest
    with pytest.raises(ValueError, match="is not the one that made the tokens"):
        load_corpus(folder, tokenizer=wrong)
