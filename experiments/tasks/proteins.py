"""Masked residues of proteins."""

import os
from typing import Any, ClassVar

from experiments.data import proteins as data
from experiments.data.masking import Masking
from experiments.tasks.masked import MaskedTask
from layers.kernels.segments import Padding


class Proteins(MaskedTask):
    """The masked residues of a protein, from all others (as ESM-2; LC-PLM, Wang et al. 2024, arXiv:2411.08909).

    Proteins are a FASTA file, or a stand-in with motifs and pairs of residues (see `data.proteins.drawn`). A row is a protein, or a piece of a
    longer one. The baselines of a split are frequencies and neighbours.

    Attributes:
      vocab_size: 24: twenty amino acids, U, O, X for an unknown one, and the mask.
    """

    vocab_size = len(data.VOCABULARY) + 1
    padding: ClassVar[Padding] = "end"
    packed: ClassVar[bool] = False

    def __init__(
        self,
        *,
        file: str | os.PathLike | None = None,
        length: int = 256,
        proteins: int | None = None,
        seed: int = 0,
        mask_rate: float = 0.15,
        masked: float = 0.8,
        random: float = 0.1,
        mask_seed: int = 0,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the proteins.

        Args:
          file: a FASTA file (.fa, .fasta or .faa), such as UniRef50's; None for the stand-in.
          length: most residues of a row.
          proteins, seed: number of proteins of the stand-in, by default 5000, and its seed; None and 0 with a file.
          mask_rate, masked, random, mask_seed: see `data.masking.Masking`.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          ValueError: the file is missing or no FASTA of proteins, a split is empty, or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        masking = Masking(mask_rate=mask_rate, masked=masked, random=random, mask_seed=mask_seed)
        dataset = data.load(file, length=length, proteins=proteins, seed=seed, data_dir=data_dir)
        self.splits = self.hidden(dataset.splits, masking)
        self.manifest: dict[str, Any] = dataset.manifest | dict(masking=dict(vars(masking)))

    @staticmethod
    def sizes(**_: Any) -> dict[str, int]:
        """Returns the number of tokens, without data."""
        return {"vocab_size": Proteins.vocab_size}
