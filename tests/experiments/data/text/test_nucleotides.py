"""Tokens of DNA against Python's own strings, and FASTA files."""

import itertools
import random

import numpy as np
import pytest

from experiments.data.text import nucleotides
from experiments.data.text.datasets import load_corpus
from experiments.data.text.prepared import load_prepared
from experiments.data.text.sources import read_documents
from experiments.data.text.tokenizers import make_tokenizer

SEQUENCE = "".join(random.Random(0).choices("ACGTN", [9, 9, 9, 9, 1], k=400)) + "ACGTAC"


@pytest.mark.parametrize("word", [1, 3, 6])
def test_sequences_come_back_also_from_the_other_strand(word):
    tokenizer = make_tokenizer("nucleotides" if word == 1 else f"nucleotides:{word}", texts=list)
    ids = tokenizer.encode(SEQUENCE.lower())
    assert ids.dtype == np.int32
    assert tokenizer.decode([*ids, tokenizer.end]) == SEQUENCE
    assert tokenizer.bytes_per_token[ids].sum() == len(SEQUENCE)
    other = SEQUENCE[::-1].translate(str.maketrans("ACGT", "TGCA"))
    assert tokenizer.decode(tokenizer.reverse_complement(ids)) == other
    if word == 1:
        assert ids.tolist() == ["ACGTN".index(base) for base in SEQUENCE]
        assert tokenizer.vocab_size == 6
    else:
        assert tokenizer.vocab_size == 5 + 4**word + 1
        # Words begin at multiples of their length, and those with an N, and the end, are written base by base.
        words = [SEQUENCE[start : start + word] for start in range(0, len(SEQUENCE), word)]
        whole = ["N" not in each and len(each) == word for each in words]
        assert len(ids) == sum(1 if one else len(each) for one, each in zip(whole, words, strict=True))
        value = sum("ACGT".index(base) * 4**k for k, base in enumerate(reversed(words[whole.index(True)])))
        assert ids[ids >= 5][0] == 5 + value


def test_letters():
    tokenizer = make_tokenizer("nucleotides", texts=list)
    assert tokenizer.decode(tokenizer.encode("acRYkvN")) == "ACNNNNN"
    for text, said in {
        "AC-G": "character 2 of a sequence is '-'",
        "ACGT🐍": "character 4",
        "AU": "is 'U'",
    }.items():
        with pytest.raises(ValueError, match=f"{said}.*expected A, C, G, T, N or one of RYSWKMBDHVN"):
            tokenizer.encode(text)
    for name in ("nucleotides:1", "nucleotides:9", "nucleotides:x", "nucleotides:"):
        with pytest.raises(
            ValueError, match=f"tokenizer='{name}'; expected nucleotides, or nucleotides:WORD with"
        ):
            make_tokenizer(name, texts=list)
    manifests = [make_tokenizer(f"nucleotides{word}", texts=list).manifest for word in ("", ":2", ":6")]
    assert len({manifest["sha256"] for manifest in manifests}) == 3


def test_fasta(tmp_path, monkeypatch):
    monkeypatch.setattr(nucleotides, "PIECE", 50)
    rng = random.Random(1)
    sequences = ["".join(rng.choices("ACGTacgt", k=rng.randrange(1, 120))) for _ in range(80)]
    text = "".join(
        f">chr{k} of > many\r\n"
        + "".join(f"{each[start : start + 30]}\n" for start in range(0, len(each), 30))
        for k, each in enumerate(sequences)
    )
    (tmp_path / "genome.fa").write_text(text + ">empty\n")
    documents = read_documents(tmp_path / "genome.fa")
    pieces = [each[start : start + 50] for each in sequences for start in range(0, len(each), 50)]
    assert sorted(itertools.chain(*documents.values())) == sorted(pieces)
    corpus = load_corpus(tmp_path / "genome.fa", tokenizer="nucleotides:3", data_dir=tmp_path / "data")
    train = corpus.dataset.splits["train"]
    assert [corpus.tokenizer.decode(train[k][0]) for k in range(3)] == [
        each.upper() for each in documents["train"][:3]
    ]
    prepared = load_prepared(
        next(path.parent for path in tmp_path.glob("data/*/manifest.json")), tokenizer="nucleotides:3"
    )
    assert prepared[1].manifest == corpus.tokenizer.manifest
    (tmp_path / "bad.fasta").write_text("ACGT\n>x\nACGT\n")
    with pytest.raises(ValueError, match=r"bad\.fasta begins with 'ACGT'; expected FASTA"):
        read_documents(tmp_path / "bad.fasta")
