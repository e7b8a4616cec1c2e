"""Windows of genomes, labelled by species: FASTA files, or chains of nucleotides that are drawn from a seed."""

import hashlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.sequences import Sequences
from experiments.data.text.documents import read_text
from experiments.data.text.nucleotides import ANY, BASES, FASTA, Nucleotides, read_fasta
from layers.options import check_integer

PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # of each genome
VOCABULARY = (*BASES, "N")
MOST_UNKNOWN = 0.5  # of the bases of a window
SPECIES, ORDER = 5, 3  # of the stand-in
CHAINS, CHAIN = 1000, 1000  # number and length of the pieces of its genomes
VERSION = 1


def load(
    files: Sequence[str] | None, *, length: int, seed: int, data_dir: str | os.PathLike | None = None
) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test", cached: windows of `length` bases side by side, and the number of the species.

    The first 80% of a genome are for training and its last tenth for test, so that windows of two splits share no base. Windows
    of which more than half is unknown (N) are left out.

    Args:
      files: a FASTA file per species; None for five species that are drawn, whose next base depends on the last three.
      seed: seed of those; 0 with files.

    Raises:
      ValueError: a file is missing or no FASTA, a name occurs twice, a part of a genome has no window, or a number is invalid.
    """
    check_integer("task.length", length, least=2)
    check_integer("task.seed", seed, least=0)
    check_files(files)
    if files is None:
        names = tuple(f"species_{number}" for number in range(SPECIES))
        parameters, given = (
            dict(species=SPECIES, order=ORDER, bases=CHAINS * CHAIN, seed=seed),
            f" --seed={seed}",
        )
    elif seed:
        raise ValueError(
            f"task.seed={seed} is that of the stand-in and has no effect on task.files; expected 0"
        )
    else:
        paths = [_file(file) for file in files]
        names = tuple(path.stem for path in paths)
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"task.files has two files named {twice[0]}; a species has one file, by whose name it is called"
            )
        digests = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        parameters, given = dict(files=digests), "".join(f" {shlex.quote(str(path))}" for path in paths)

    def build() -> dict[str, Sequences]:
        genomes = drawn(seed) if files is None else [read(path) for path in paths]
        return {split: _windows(names, genomes, split, length) for split in PARTS}

    recipe = cache.Recipe(
        name="species",
        version=VERSION,
        parameters=dict(parameters, length=length, names=list(names)),
        vocabulary=VOCABULARY,
        rebuild=f"python -m experiments.data.prepare species --length={length}{given}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def check_files(files: Sequence[str] | None) -> None:
    """Raises ValueError unless there are two files or more, or none is given; reads nothing."""
    if files is not None and (isinstance(files, str) or len(files) < 2):
        raise ValueError(f"task.files={files!r}; expected two files or more, one per species")


def _file(file: str | os.PathLike) -> Path:
    path = cache.expand("task.files", file)
    if not path.is_file() or path.suffix not in FASTA:
        raise ValueError(f"task.files: {str(file)!r} is no file of {', '.join(FASTA)}")
    return path


def read(path: Path) -> np.ndarray:
    """Returns the bases of a FASTA file, 0 to 3 for A, C, G and T and 4 for unknown ones, uint8; its records follow each other.

    Raises:
      ValueError: it is no FASTA.
    """
    tokenizer = Nucleotides()
    try:
        pieces = [
            tokenizer.encode(piece) for piece in read_fasta(read_text(path, str(path), "error"), str(path))
        ]
    except ValueError as error:
        raise ValueError(f"task.files: {str(error).removeprefix('source: ')}") from None
    return np.concatenate(pieces).astype(np.uint8) if pieces else np.zeros(0, np.uint8)


def drawn(seed: int) -> list[np.ndarray]:
    """Returns genomes whose next base depends on the last three, by a table of random probabilities per species.

    They are chains of 1,000 bases one behind the other.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    tables = rng.exponential(size=(SPECIES, len(BASES) ** ORDER, len(BASES)))
    bounds = np.cumsum(tables / tables.sum(-1, keepdims=True), axis=-1)[..., :-1]
    genomes = np.zeros((SPECIES, CHAINS, CHAIN), np.uint8)
    state = np.broadcast_to(np.arange(CHAINS) % len(BASES) ** ORDER, (SPECIES, CHAINS))
    for place in range(CHAIN):
        draws = rng.random((SPECIES, CHAINS, 1))
        base = (draws >= bounds[np.arange(SPECIES)[:, None], state]).sum(-1)
        genomes[..., place] = base
        state = (state * len(BASES) + base) % len(BASES) ** ORDER
    return list(genomes.reshape(SPECIES, -1))


def _windows(names: Sequence[str], genomes: Sequence[np.ndarray], split: str, length: int) -> Sequences:
    found, labels = [], []
    for number, (name, genome) in enumerate(zip(names, genomes, strict=True)):
        start, end = (int(bound * len(genome)) for bound in PARTS[split])
        windows = genome[start : end - (end - start) % length].reshape(-1, length)
        windows = windows[(windows == ANY).mean(1) <= MOST_UNKNOWN]
        if not len(windows):
            raise ValueError(
                f"{name} has {len(genome)} bases, which leaves the split {split!r} without a window of task.length={length} known bases"
            )
        found.append(windows.ravel())
        labels += [number] * len(windows)
    return Sequences(np.concatenate(found), np.arange(len(labels) + 1) * length, np.array(labels))
