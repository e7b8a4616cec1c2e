"""Mamba-2 on sequences longer than those of training, without training: LongMamba (Ye et al. 2025, arXiv:2504.16053)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.mixers.state_space.mamba2 import Mamba2
from layers.options import Fraction, Positive, checked_dataclass
from layers.typing import Array, Float, Int
from seqmodels.language_model import LanguageModel
from seqmodels.rows import read_rows


class LeastStep(nnx.Variable):
    """The largest step size of each head at which it skips a token."""


@checked_dataclass
class LengthenConfig:
    """Options of `lengthen`, by default those of LongMamba.

    Attributes:
      length: L, number of tokens that rows will have.
      decay: least part of a state that a global head keeps over the length of training.
      clamp: part of the tokens of a row, those of the largest step sizes, whose step sizes count as the smallest of them.
      factor: factor on the bounds.
    """

    length: int
    decay: Fraction = 0.05
    clamp: Fraction = 0.1
    factor: Positive = 1.0


def lengthen(
    model: LanguageModel, tokens: Int[Array, "n t"] | Int[np.ndarray, "n t"], config: LengthenConfig
) -> dict[int, Float[np.ndarray, "h"]]:
    """Makes the global heads of Mamba-2 layers skip tokens of small steps, and returns the bounds by layer.

        global:  mean_rows exp(-exp(log_a) sum_t dt_t) > decay
        bound:   mean_rows of the sorted dt, stretched to L tokens, behind the first whose sum exceeds sum_t dt_t

    per head, with dt of rows of the length of training, clamped. Then a row of L tokens changes the states of these heads about as
    much as one of training. Other heads have a bound of -inf, as have all where `length` is at most t.

    All tokens are filtered, in the authors' code those of a prompt alone: so a call gives what several give. The bounds are no
    parameters, and no checkpoint holds them. A second call replaces them.

    Args:
      model: a language model with layers of `mamba2`.
      tokens: rows as long as those of training, t tokens, without padding; the authors have 100 rows of 2,000.

    Raises:
      ValueError, TypeError: no layer is Mamba-2, layers share blocks, or tokens are no rows of the model's vocabulary.
    """
    stack = model.stack
    layers = [layer for layer in range(stack.config.depth) if isinstance(stack.block(layer).mixer, Mamba2)]
    if not layers or stack.uses:
        raise ValueError(
            f"model has layers of {', '.join(stack.config.pattern)}{' and shared blocks' if stack.uses else ''}; expected some of "
            "mamba2, and no shared blocks"
        )
    tokens = read_rows(model, tokens)
    _set(model, {})
    steps = _steps(*nnx.split(model), jnp.asarray(tokens))
    bounds = {}
    for layer in layers:
        rate = np.exp(np.asarray(stack.block(layer).mixer.log_a[...], np.float64))
        bounds[layer] = bounds_of(np.asarray(steps[layer], np.float64), rate, config)
    _set(model, bounds)
    return bounds


def _steps(graph, variables, tokens):
    """Returns the step sizes (n, t, h) of the layers of Mamba-2."""

    @jax.jit
    def run(variables, tokens):
        model = nnx.merge(graph, variables)
        (x, _), values, found = model.embedding(tokens), None, {}
        for layer, block in enumerate(model.stack.layers):
            if isinstance(block.mixer, Mamba2):
                found[layer] = block.mixer.project(block.read_by_mixer(x))[2]
            x, _, values = block.sharing(x, None, values)
        return found

    return run(variables, tokens)


def bounds_of(
    steps: Float[np.ndarray, "n t h"], rate: Float[np.ndarray, "h"], config: LengthenConfig
) -> Float[np.ndarray, "h"]:
    """Returns the bounds of a layer, given step sizes and exp(log_a), float64; see `lengthen`."""
    _, t, heads = steps.shape
    if config.length <= t:
        return np.full(heads, -np.inf)
    steps = -np.sort(-steps, axis=1)
    most = steps[:, max(1, int(t * config.clamp)) - 1]
    steps = np.minimum(steps, most[:, None])
    total = steps.sum(1)
    kept = np.exp(-rate * total).mean(0)
    # Token i of L stands at (i + 1/2) t / L - 1/2 of t.
    place = np.clip((np.arange(config.length) + 0.5) * t / config.length - 0.5, 0, t - 1)
    low = np.floor(place).astype(int)
    part = (place - low)[None, :, None]
    longer = steps[:, low] * (1 - part) + steps[:, np.minimum(low + 1, t - 1)] * part
    behind = np.minimum((np.cumsum(longer, axis=1) > total[:, None]).argmax(1) + 1, config.length - 1)
    found = np.take_along_axis(longer, behind[:, None], axis=1)[:, 0].mean(0)
    return np.where(kept > config.decay, config.factor * found, -np.inf)


def _set(model, bounds):
    """Gives the layers of Mamba-2 their bounds, or None where there are none."""
    stack, period = model.stack, len(model.stack.stacked)
    scanned = stack.repeats * period
    for place, block in enumerate(stack.stacked):
        if isinstance(block.mixer, Mamba2):
            layers = tuple(range(place, scanned, period))
            found = [bounds[layer] for layer in layers] if bounds else None
            block.mixer.least_step = _variable(found, layers)
    for layer, block in enumerate(stack.blocks, start=scanned):
        if isinstance(block.mixer, Mamba2):
            block.mixer.least_step = _variable(bounds.get(layer), (layer,))


def _variable(bounds, layers):
    return (
        nnx.data(None)
        if bounds is None
        else LeastStep(jnp.asarray(np.array(bounds), jnp.float32), layers=layers)
    )
