"""Species: windows of small FASTA files by split, the stand-in and its chains, and malformed files."""

import numpy as np
import pytest

from experiments.data import species
from experiments.tasks import make_task

LETTERS = "ACGTN"


@pytest.fixture
def genomes(tmp_path):
    """Two genomes of 200 and 103 bases; of the first one, bases 40 to 59 are unknown."""
    rng, found = np.random.default_rng(0), {}
    for name, length in (("fly", 200), ("yeast", 103)):
        bases = rng.integers(0, 4, length)
        bases[40:60] = 4 if name == "fly" else bases[40:60]
        text = "".join(LETTERS[base] for base in bases)
        path = tmp_path / f"{name}.fa"
        path.write_text(f">one\n{text[:70]}\n{text[70:90].lower()}\n>two\n{text[90:]}\n")
        found[str(path)] = bases
    return found


def test_windows_lie_side_by_side_in_their_part(genomes, tmp_path):
    task = make_task("species", files=tuple(genomes), length=10, data_dir=tmp_path / "data")
    assert task.num_classes == 2
    fly, yeast = genomes.values()
    expected = {
        "train": [*fly[:40].reshape(-1, 10), *fly[60:160].reshape(-1, 10), *yeast[:80].reshape(-1, 10)],
        "validation": [fly[160:170], fly[170:180], yeast[82:92]],
        "test": [fly[180:190], fly[190:200], yeast[92:102]],
    }
    for split, windows in expected.items():
        batch = task.splits[split].gather(np.arange(len(task.splits[split])), 10)
        np.testing.assert_array_equal(batch["inputs"], windows)
    assert batch["labels"].tolist() == [0, 0, 1]
    assert task.manifest["parameters"]["names"] == ["fly", "yeast"]


def test_chains_tell_the_species_of_the_stand_in(monkeypatch, tmp_path):
    """A chain of order 3 knows what the genomes are drawn by; frequencies of single bases know less."""
    monkeypatch.setattr(species, "CHAINS", 100)
    task = make_task("species", length=64, data_dir=tmp_path)
    sizes = {split: np.bincount(source.labels).tolist() for split, source in task.splits.items()}
    assert sizes == dict(train=[1250] * 5, validation=[156] * 5, test=[156] * 5)
    found = task.baselines()
    assert found["majority"] == pytest.approx(0.2)
    assert found["order_3"] > 0.99 > found["order_0"] > 0.4
    genome = species.drawn(0)[0].astype(int)
    counts = np.zeros((64, 4))
    pieces = genome.reshape(species.CHAINS, -1)
    for row in pieces:
        for place in range(3, len(row)):
            counts[row[place - 3] * 16 + row[place - 2] * 4 + row[place - 1], row[place]] += 1
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(0)))
    table = rng.exponential(size=(5, 64, 4))[0]
    seen = counts.sum(1) > 2000
    assert seen.sum() > 10
    np.testing.assert_allclose(
        (counts / counts.sum(1, keepdims=True))[seen], (table / table.sum(1, keepdims=True))[seen], atol=0.05
    )


def test_baselines_by_hand(genomes, tmp_path):
    task = make_task("species", files=tuple(genomes), length=10, data_dir=tmp_path / "data")
    train, test = task.splits["train"], task.splits["test"]
    counts = np.ones((2, 4))
    for number in range(len(train)):
        tokens, label = train[number]
        for base in tokens:
            counts[label, base] += 1
    logs = np.log(counts / counts.sum(1, keepdims=True))
    right = [
        np.argmax([sum(logs[k][base] for base in test[n][0]) for k in (0, 1)]) == test[n][1]
        for n in range(len(test))
    ]
    found = task.baselines()
    assert found["order_0"] == pytest.approx(np.mean(right))
    assert found["majority"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(files="one.fa"), "expected two files or more"),
        (dict(files=("one.fa",)), "expected two files or more"),
        (dict(files=("missing.fa", "two.fa")), "'missing.fa' is no file of .fa, .fasta, .fna"),
        (dict(length=1), "length"),
        (dict(seed=-1), "seed"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("species", **options)


def test_wrong_files_are_refused(genomes, tmp_path):
    fly, yeast = genomes
    other = tmp_path / "other"
    other.mkdir()
    (other / "fly.fa").write_text(">one\nACGT\n")
    (other / "text.fa").write_text("ACGT\n")
    (other / "odd.fa").write_text(">one\nACGX\n")
    for files, options, message in (
        ((fly, str(other / "fly.fa")), {}, "two files named fly"),
        ((fly, str(other / "text.fa")), {}, "expected FASTA"),
        ((fly, str(other / "odd.fa")), {}, "is 'X'"),
        ((fly, yeast), dict(length=20), "yeast has 103 bases, which leaves the split 'validation'"),
        ((fly, yeast), dict(seed=1), "task.seed=1 is that of the stand-in"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task("species", files=files, data_dir=tmp_path / "data", **dict(dict(length=10), **options))
