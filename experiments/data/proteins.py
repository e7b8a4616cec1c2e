"""Proteins: a FASTA file of amino acids, or a stand-in with motifs and pairs of residues that are far apart."""

import hashlib
import os
import shlex
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.sequences import Sequences
from experiments.data.text.documents import SPLITS, split_of
from layers.options import check_integer

ACIDS = "ACDEFGHIKLMNPQRSTVWY"
RARE, AMBIGUOUS = "UO", "XBZJ"  # selenocysteine and pyrrolysine; letters of several acids
VOCABULARY = (*ACIDS, *RARE, "X")
UNKNOWN = len(VOCABULARY) - 1
ENDINGS = (".fa", ".fasta", ".faa")
MOTIFS, MOTIF, STEM = 8, 8, (4, 8)  # of the stand-in: motifs and their length, and lengths of a stem
COUNT = 5000
VERSION = 1


def load(
    file: str | os.PathLike | None,
    *,
    length: int,
    proteins: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test", cached: proteins, the longer ones in pieces of `length` residues.

    A protein belongs to the split that the hash of its sequence says, so that equal ones share a split: 90%, 5% and 5%.

    Args:
      file: a FASTA file; None for the stand-in.
      proteins: number of proteins of the stand-in, 5000 if None; None with a file.
      seed: seed of the stand-in; 0 with a file.

    Raises:
      ValueError: the file is missing or no FASTA of proteins, a split is empty, or a number is invalid.
    """
    check_integer("task.length", length, least=8)
    if file is not None and proteins is not None:
        raise ValueError(
            f"task.proteins={proteins} is that of the stand-in and has no effect on task.file; expected None"
        )
    proteins = COUNT if proteins is None else proteins
    check_integer("task.proteins", proteins, least=1)
    check_integer("task.seed", seed, least=0)
    parameters, given = dict(proteins=proteins, seed=seed), f" --proteins={proteins} --seed={seed}"
    if file is not None:
        if seed:
            raise ValueError(
                f"task.seed={seed} is that of the stand-in and has no effect on task.file; expected 0"
            )
        path = cache.expand("task.file", file)
        if not path.is_file() or path.suffix not in ENDINGS:
            raise ValueError(f"task.file: {str(file)!r} is no file of {', '.join(ENDINGS)}")
        parameters = dict(file=hashlib.sha256(path.read_bytes()).hexdigest())
        given = f" --file={shlex.quote(str(path))}"

    def build() -> dict[str, Sequences]:
        found = drawn(proteins, seed) if file is None else read(path)
        parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for protein in found:
            whole = "".join(VOCABULARY[acid] for acid in protein)
            parts[split_of(whole)] += [
                protein[start : start + length] for start in range(0, len(protein), length)
            ]
        if empty := [split for split, pieces in parts.items() if not pieces]:
            raise ValueError(f"{len(found)} proteins leave the split {empty[0]!r} empty; expected more")
        return {split: _joined(pieces) for split, pieces in parts.items()}

    recipe = cache.Recipe(
        name="proteins",
        version=VERSION,
        parameters=dict(parameters, length=length),
        vocabulary=VOCABULARY,
        rebuild=f"python -m experiments.data.prepare proteins --length={length}{given}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def _joined(pieces: list[np.ndarray]) -> Sequences:
    offsets = np.cumsum([0, *map(len, pieces)])
    return Sequences(np.concatenate(pieces), offsets, np.zeros(len(pieces), np.int32))


def read(path: Path) -> list[np.ndarray]:
    """Returns the proteins of a FASTA file, ids of `VOCABULARY`, uint8.

    Small letters are read as capitals, B, J, X and Z as an unknown acid, and "*" may end a protein.

    Raises:
      ValueError: the file is no FASTA of proteins; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"task.file: {path} is not UTF-8 at byte {error.start}") from None
    found: list[list[np.ndarray]] = []
    names: list[tuple[int, str]] = []
    ended = False
    for number, line in enumerate(lines, 1):
        where, text = f"task.file: line {number} of {path}", line.strip()
        if text.startswith(">"):
            if not text[1:].strip():
                raise ValueError(f"{where} is a header without a name; expected '>' and a name")
            found.append([])
            names.append((number, text[1:].split()[0]))
            ended = False
        elif text and not found:
            raise ValueError(f"{where} is {text[:20]!r}; expected FASTA, '>' and a name first")
        elif text:
            if ended:
                raise ValueError(
                    f"{where} goes on behind the '*' that ends {names[-1][1]!r}; expected '>' and a name"
                )
            ended, text = text.endswith("*"), text.removesuffix("*")
            codes = LETTERS[np.minimum(np.frombuffer(text.encode("utf-32-le"), np.uint32), len(LETTERS) - 1)]
            if (wrong := np.flatnonzero(codes < 0)).size:
                raise ValueError(
                    f"{where} has {text[wrong[0]]!r} in {names[-1][1]!r}; expected one of {ACIDS}{RARE}{AMBIGUOUS}"
                )
            found[-1].append(codes.astype(np.uint8))
    if not found:
        raise ValueError(f"task.file: {path} has no protein; expected FASTA, '>' and a name first")
    proteins = [np.concatenate(parts) if parts else np.zeros(0, np.uint8) for parts in found]
    for (number, name), protein in zip(names, proteins, strict=True):
        if not len(protein):
            raise ValueError(f"task.file: {name!r}, line {number} of {path}, has no residues; expected some")
    return proteins


def _letters() -> np.ndarray:
    """Returns the id of each character below 129, and -1 for what is no letter of an acid and for all others, in the last place."""
    table = np.full(129, -1, np.int8)
    for letters, ids in ((VOCABULARY[:-1], range(UNKNOWN)), (AMBIGUOUS, [UNKNOWN] * len(AMBIGUOUS))):
        for letter, number in zip(letters, ids, strict=True):
            table[[ord(letter), ord(letter.lower())]] = number
    return table


LETTERS = _letters()


def drawn(count: int, seed: int) -> list[np.ndarray]:
    """Returns proteins with structure that masked residues can be told by.

    A protein is a loop, then a hairpin or one of eight motifs of eight residues, then a loop, and so on, four to eight times. A loop is
    3 to 9 residues with frequencies that are drawn once. A hairpin is a stem of 4 to 8 random residues, two loops with a motif between
    them, and the partners of the stem from its last to its first: residues pair by a fixed involution that is drawn once. So motifs are
    told by neighbours, and stems by residues 15 to 41 places away alone.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    frequencies = rng.dirichlet(np.full(len(ACIDS), 2.0))
    motifs = rng.integers(0, len(ACIDS), (MOTIFS, MOTIF))
    partner = partners(rng)

    def loop() -> np.ndarray:
        return rng.choice(len(ACIDS), int(rng.integers(3, 10)), p=frequencies)

    def motif() -> np.ndarray:
        return motifs[rng.integers(MOTIFS)]

    def protein() -> np.ndarray:
        parts = [loop()]
        for _ in range(int(rng.integers(4, 9))):
            if rng.random() < 0.5:
                parts.append(motif())
            else:
                stem = rng.integers(0, len(ACIDS), int(rng.integers(STEM[0], STEM[1] + 1)))
                parts += [stem, loop(), motif(), loop(), partner[stem][::-1]]
            parts.append(loop())
        return np.concatenate(parts).astype(np.uint8)

    return [protein() for _ in range(count)]


def partners(rng: np.random.Generator) -> np.ndarray:
    """Returns the partner of each of the twenty acids, which is never itself."""
    order = rng.permutation(len(ACIDS))
    partner = np.empty(len(ACIDS), np.int64)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner
