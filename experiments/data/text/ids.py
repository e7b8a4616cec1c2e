"""What tokenizers share: checked ids, and the hash of a vocabulary."""

import hashlib
from collections.abc import Iterable

import numpy as np


def checked_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Returns ids as int64.

    Raises:
      ValueError: an id is out of range.
    """
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}; expected 0 to {vocab_size - 1}")
    return ids


def sha256_of(text: str) -> str:
    """Returns the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
