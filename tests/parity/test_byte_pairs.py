"""Byte-pair encodings of the library `tokenizers`, which comes with the optional group `parity`."""

import pytest

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
