"""HGRN2 in the format of flash-linear-attention, in which one matrix gives the lower bounds of all layers."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.config import StackConfig
from seqmodels.interop.families.flash_linear_attention import family
from seqmodels.interop.family import BLOCK, Pair, Pairs, linear, same
from seqmodels.interop.options import Options

# Of the norms of heads, whatever norm_eps is.
EPSILON = 1e-5


def _read(options: Options, width: int) -> dict[str, Any]:
    options.only("use_short_conv", False)
    options.ignore("conv_size")
    ratio, heads = options.take("expand_ratio", 128), options.take("num_heads", None)
    if ratio is None:
        ratio = width // (heads or options.take("num_heads"))
    # Their layers take the ratio, whatever num_heads says.
    if width % ratio:
        options.refuse("expand_ratio", ratio, f"a divisor of hidden_size={width}")
    return {
        "heads": width // ratio,
        "key_dim": ratio,
        "epsilon": EPSILON,
        "bounded": options.take("use_lower_bound", True),
    }


def _write(own: Any, width: int) -> dict[str, Any]:
    return {
        "expand_ratio": own.sizes[0],
        "num_heads": width // own.sizes[0],
        "use_lower_bound": own.bounded,
    }


def _pairs(_: Mapping[str, Any]) -> Pairs:
    names = {"q_proj": "query", "f_proj": "forget", "i_proj": "input", "o_proj": "output"}
    maps = (pair for theirs, ours in names.items() for pair in linear(f"attn.{theirs}", f"mixer/{ours}"))
    return *maps, same("attn.g_norm.weight", "mixer/norm/scale")


def _load_bounds(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the logit of the bound of each layer, and log sum exp(x) for the first, which has none.

    With p = softmax(x) over layers, the bound of layer i is p_1 + ... + p_i.
    """
    wide = np.asarray(x, np.float64)
    top = wide.max(0)
    total = top + np.log(np.exp(wide - top).sum(0))
    shares = np.exp(wide - total)
    bounds = np.cumsum(shares[1:], axis=0)
    rests = shares[:1] + np.cumsum(shares[:0:-1], axis=0)[::-1] - shares[1:]
    with np.errstate(divide="ignore"):
        logits = np.log(bounds) - np.log(rests)
    return tuple(logit.astype(x.dtype) for logit in (total, *logits))


def _save_bounds(total: np.ndarray, *logits: np.ndarray) -> tuple[np.ndarray]:
    """Returns the matrix whose softmax gives the bounds: the logarithms of their differences, and of what is left of 1."""
    wide = [np.asarray(logit, np.float64) for logit in logits]
    bounds = [np.zeros(total.shape), *(1 / (1 + np.exp(-logit)) for logit in wide)]
    rest = 1 / (1 + np.exp(wide[-1])) if wide else np.ones(total.shape)
    shares = np.stack([rest, *(high - low for low, high in itertools.pairwise(bounds))])
    if (shares < 0).any():
        raise ValueError(
            "the lower bounds of decays fall from one layer to a later one; HGRN2ForCausalLM holds bounds that grow with depth"
        )
    with np.errstate(divide="ignore"):
        return ((np.log(shares) + np.asarray(total, np.float64)).astype(total.dtype),)


def _bounds(stack: StackConfig) -> Pairs:
    names = tuple(f"{BLOCK}/{layer}/mixer/bound_logit" for layer in range(stack.depth))
    return (Pair(("model.lower_bounds",), names, _load_bounds, _save_bounds),)


HGRN2 = family("HGRN2ForCausalLM", "hgrn2", "hgrn2", _read, _write, _pairs, more=_bounds)
