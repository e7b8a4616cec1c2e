"""Validation splits held out of a training set that has none."""

import numpy as np


def hold_out(count: int, held_out: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that stay in the training set and the `held_out` rows of validation, both in order.

    The rows are permuted by the raw output of the Philox generator, which NumPy promises not to change; the last ones are held
    out.

    Raises:
      ValueError: if one of the two would be empty.
    """
    if not 0 < held_out < count:
        raise ValueError(
            f"task.validation={held_out} of {count} training examples are to be held out; expected 1 to {count - 1}"
        )
    draws = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    order = np.argsort(draws, kind="stable")
    return np.sort(order[: count - held_out]), np.sort(order[count - held_out :])
