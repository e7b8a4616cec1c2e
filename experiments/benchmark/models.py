"""The language models that the studies `steps` and `decode` measure: those of configs/lm/models.py, 32,768 tokens in bfloat16."""

import runpy
from collections.abc import Sequence
from typing import Any

import jax

from experiments.config.files import shipped
from layers.registry import suggestion

USUAL = ("attention", "mamba", "mamba2", "gla", "gated_deltanet", "kda", "retnet", "rwkv7", "hyena", "rg_lru")
# Width, layers, rows of a step on one device, tokens per row, what the backward pass recomputes.
SIZES = {
    "tiny": (128, 2, 2, 64, "none"),
    "125m": (768, 12, 8, 4096, "none"),
    "350m": (1024, 24, 8, 4096, "none"),
    "1.3b": (2048, 24, 4, 4096, "full"),
}
VOCABULARY = {"tiny": 64}


def usual_size() -> str:
    """Returns the size that is measured if none is given."""
    return "tiny" if jax.default_backend() == "cpu" else "125m"


def chosen(names: Sequence[str]) -> Sequence[str]:
    """Returns the names, or the usual ones if there are none.

    Raises:
      ValueError: a name is unknown.
    """
    known = _options("tiny", 64)
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is unknown{suggestion(name, known)}; choose from {', '.join(known)}")
    return names or USUAL


def config(name: str, size: str, length: int) -> dict[str, Any]:
    """Returns the section `model` of a model at a size, for rows of `length` tokens."""
    return _options(size, length)[name] | dict(
        kind="language_model",
        vocab_size=VOCABULARY.get(size, 32768),
        tie_embeddings=True,
        dtype="bfloat16",
        remat=SIZES[size][-1],
    )


def _options(size: str, length: int) -> dict[str, dict[str, Any]]:
    width, depth, *_ = SIZES[size]
    return runpy.run_path(str(shipped()["configs/lm/models.py"]))["models"](width, depth, length)
