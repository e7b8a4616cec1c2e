"""Prepared corpora: a folder of tokens gives what the text gives, and what does not fit it is refused."""

import json
import shutil

import numpy as np
import pytest

from experiments.data.cache import CorruptCacheError
from experiments.data.text.datasets import load_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus whose text is gone, as `load_corpus` gave it when the text was there."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "texts").mkdir()
    for number in range(200):
        (root / "texts" / f"{number}.txt").write_text(f"é{number} " * (number % 7 + 1), encoding="utf-8")
    found = load_corpus(root / "texts", data_dir=root / "data")
    shutil.rmtree(root / "texts")
    return found


def test_the_folder_gives_what_the_text_gave(corpus, tmp_path):
    folder = shutil.copytree(corpus.dataset.folder, tmp_path / "elsewhere")
    found = load_corpus(folder)
    assert found.dataset.manifest == corpus.dataset.manifest
    assert found.tokenizer.manifest == corpus.tokenizer.manifest
    for split, documents in corpus.dataset.splits.items():
        np.testing.assert_array_equal(found.dataset.splits[split].tokens, documents.tokens)
        np.testing.assert_array_equal(found.dataset.splits[split].labels, documents.labels)


@pytest.mark.parametrize(
    "tokenizer, problem",
    [
        ("characters", "tokenizer='characters' with the prepared corpus .*; expected bytes$"),
        ("bpe:300", "tokenizer='bpe:300' with the prepared corpus .*; expected bytes$"),
        ("none.json", "none.json' cannot be read"),
    ],
)
def test_other_tokenizers_are_refused(corpus, tokenizer, problem):
    with pytest.raises(ValueError, match=problem):
        load_corpus(corpus.dataset.folder, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "made_with, given, problem",
    [
        (dict(name="characters", vocab_size=99), "characters", "expected the text itself as the source"),
        (dict(name="bpe", vocab_size=300), "bytes", "is not the one that made the tokens in .*, bpe with 300 ids"),
        (dict(name="bpe", vocab_size=300), "bpe:300", r"no file bpe-300-\*-abc.json beside the prepared corpus"),
        (dict(name="bpe", vocab_size=300), "characters", "expected bpe:300, or the path of its tokenizer.json"),
    ],
)  # fmt: skip
def test_tokenizers_of_other_corpora_are_refused(corpus, tmp_path, made_with, given, problem):
    folder = shutil.copytree(corpus.dataset.folder, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parameters"]["tokenizer"] = made_with | dict(sha256="abc")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=problem):
        load_corpus(folder, tokenizer=given)


def test_damage_is_named(corpus, tmp_path):
    folder = shutil.copytree(corpus.dataset.folder, tmp_path / "damaged")
    with (folder / "test.array_record").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptCacheError, match="test.array_record: .* Copy the folder again"):
        load_corpus(folder)
    (folder / "manifest.json").write_text('{"parameters": {}}')
    with pytest.raises(ValueError, match="is no corpus that `experiments.data.prepare text` made"):
        load_corpus(folder)
