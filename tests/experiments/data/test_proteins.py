"""Proteins: the letters of a file by hand, what is refused by its line, and the structure of the stand-in."""

import numpy as np
import pytest

from experiments.data import proteins
from experiments.tasks import make_task


def written(tmp_path, text, name="some.fasta"):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def letters(protein):
    return "".join(proteins.VOCABULARY[acid] for acid in protein)


def test_a_file_by_hand(tmp_path):
    file = written(
        tmp_path, ">sp|P1|ONE first protein\r\nMKv\r\nLUO\r\n\r\n>two\nBJXZ\n  ac*\n>three\nWW\n*\n"
    )
    assert [letters(protein) for protein in proteins.read(file)] == ["MKVLUO", "XXXXAC", "WW"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MKV\n", r"line 1 of .* is 'MKV'; expected FASTA"),
        ("", "has no protein; expected FASTA"),
        (">\nMKV\n", "line 1 of .* is a header without a name"),
        (">one\nMKV\n>two\n\n>three\nMM\n", "'two', line 3 of .*, has no residues"),
        (">one\nMKV\nMK1V\n", "line 3 of .* has '1' in 'one'; expected one of"),
        (">one\nMK-V\n", "line 2 of .* has '-' in 'one'"),
        (">one\nMK*\nMV\n", "line 3 of .* goes on behind the '\\*' that ends 'one'"),
        (">one\nMK*V\n", "line 2 of .* has '\\*' in 'one'"),
        (">one\nMK\u00c4\n", "has '\u00c4' in 'one'"),
        (b">one\nMK\xff\n", "is not UTF-8 at byte 7"),
    ],
)
def test_wrong_files_are_refused_by_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        proteins.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(file="missing.fa"), "'missing.fa' is no file of .fa, .fasta, .faa"),
        (dict(seed=-1), "seed"),
        (dict(proteins=0), "task.proteins=0"),
        (dict(proteins=1), "leave the split '.*' empty"),
        (dict(length=4), "task.length=4"),
        (dict(mask_rate=0.0), "mask_rate=0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_task("proteins", data_dir=tmp_path, **options)


def test_options_of_the_stand_in_are_refused_with_a_file(tmp_path):
    file = written(tmp_path, ">one\nMKV\n")
    for options, message in (
        (dict(seed=1), "task.seed=1 is that"),
        (dict(proteins=9), "task.proteins=9 is that"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task("proteins", file=file, data_dir=tmp_path, **options)


def test_long_proteins_are_cut_and_equal_ones_share_a_split(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(proteins.ACIDS), size)) for size in rng.integers(5, 60, 90)]
    file = written(tmp_path, "".join(f">p{n}\n{text}\n" for n, text in enumerate(texts + texts)))
    dataset = proteins.load(file, length=16, data_dir=tmp_path / "data")
    found = [letters(split[n][0]) for split in dataset.splits.values() for n in range(len(split))]
    assert max(map(len, found)) == 16
    assert sum(map(len, found)) == 2 * sum(map(len, texts))
    train, test = (
        {letters(s[n][0]) for n in range(len(s))} for s in (dataset.splits["train"], dataset.splits["test"])
    )
    assert not {piece for piece in train & test if len(piece) == 16}


def test_the_stand_in_has_motifs_and_pairs():
    """Of residues whose partner some way behind is known, far more agree than by chance, and not by neighbours."""
    found = proteins.drawn(40, seed=0)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(0)))
    rng.dirichlet(np.full(20, 2.0))
    motifs = rng.integers(0, 20, (proteins.MOTIFS, proteins.MOTIF))
    partner = proteins.partners(rng)
    assert np.all(partner[partner] == np.arange(20))
    assert np.all(partner != np.arange(20))
    texts = [letters(protein) for protein in found]
    names = ["".join(proteins.VOCABULARY[acid] for acid in motif) for motif in motifs]
    assert sum(any(name in text for name in names) for text in texts) == len(texts)
    stems = 0
    for protein in found:
        for start in range(len(protein) - 4):
            ends = (
                np.lib.stride_tricks.sliding_window_view(protein[start + 18 :], 4)
                if len(protein) > start + 22
                else ()
            )
            stems += any((partner[protein[start : start + 4]][::-1] == end).all() for end in ends[:30])
    assert stems > 40
    assert max(map(len, found)) < 600
