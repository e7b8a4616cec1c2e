"""Mamba on texts longer than those of training: prompts of which layers drop tokens (DeciMamba, Ben-Kish et al. 2024, arXiv:2406.14528)."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.mixer import MixerState
from layers.mixers.state_space.mamba import Mamba, MambaCarry
from layers.options import Bound, Count, checked_dataclass
from layers.reduction.kept import taken
from layers.segments import initial_place, visit
from layers.typing import Array, Float, Int
from seqmodels.backbone import normalized
from seqmodels.language_model import LanguageModel, LanguageModelState
from seqmodels.rows import read_rows


@checked_dataclass
class DecimateConfig:
    """Options of `decimate`.

    Attributes:
      layers: the layers that drop tokens, in order.
      length: the most tokens that the first of them keeps, about the length of training.
      factor: each of them keeps at most this part of what the one before keeps at most.
      least: tokens that each keeps at least, as far as there are as many.
      last: tokens at the end of a prompt that no layer drops; 0 for those of the choice alone.
    """

    layers: tuple[Count, ...]
    length: int
    factor: Annotated[float, Bound(above=0, most=1)] = 0.5
    least: int = 20
    last: Count = 0

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={self.layers}; expected one or more layers in order, each once")

    def kept(self, number: int, tokens: int) -> int:
        """Returns how many of so many tokens the layer of this number among `layers` keeps."""
        free = max(0, tokens - self.last)
        return min(tokens, self.last) + min(
            free, max(int(min(free, self.length * self.factor**number)), self.least)
        )


class Decimated(NamedTuple):
    """A prompt of which tokens were dropped.

    Attributes:
      logits: logits of the token after each of those that remain (b, n, v).
      places: their places in the prompt (b, n), in order.
      state: what `model(tokens, state)` continues, which drops nothing.
    """

    logits: Float[Array, "b n v"]
    places: Int[Array, "b n"]
    state: LanguageModelState


def decimate(
    model: LanguageModel, tokens: Int[Array, "b t"] | Int[np.ndarray, "b t"], config: DecimateConfig
) -> Decimated:
    """Returns what a prompt gives if some layers of Mamba drop the tokens of small steps (DeciMamba, arXiv:2406.14528).

        kept:  the P_s tokens of the largest |dt_t|, in order, and the last ones;   P_s = max(min(t, length factor^s), least)

    with |dt_t| the Euclidean norm of the step sizes of all channels, in the s-th of `layers`. Its scan and all later layers read the
    kept tokens alone, and the others leave the residual stream; its short convolution reads all of them, as in the authors' code. A call
    of the returned state reads every token. Nothing is trained.

    Args:
      model: a language model whose layers are all `mamba` without a channel mixer, with norms before them.
      tokens: prompts of one length without padding.

    Raises:
      ValueError, TypeError: a layer is of another kind or does not exist, or tokens are no rows of the model's vocabulary.
    """
    stack = model.stack
    plain = (
        stack.config.residual,
        stack.config.norm_position,
        stack.config.residual_scale,
        stack.config.branch_scale,
    )
    blocks = stack.layers
    if any(type(block.mixer) is not Mamba or block.channel is not None for block in blocks) or stack.uses:
        raise ValueError(
            f"model has layers of {', '.join(stack.config.pattern)}; expected mamba+none in every one, and no shared blocks"
        )
    if plain != ("separate", "pre", 1.0, 1.0) or model.config.input.absolute_positions != "none":
        raise ValueError(
            "the model has other residuals, norms or positions than Mamba; expected the defaults of its config"
        )
    if config.layers[-1] >= len(blocks):
        raise ValueError(f"layers={config.layers}; expected numbers below depth={len(blocks)}")
    tokens = jnp.asarray(read_rows(model, tokens))
    graph, variables = nnx.split(model)
    return jax.jit(lambda variables, tokens: _run(nnx.merge(graph, variables), tokens, config))(
        variables, tokens
    )


def _run(model, tokens, config):
    x, _ = model.embedding(tokens)
    places = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], tokens.shape)
    states: list[Any] = []
    for layer, block in enumerate(model.stack.layers):
        mixer, start = block.mixer, block.mixer.init_state(len(x))
        if layer not in config.layers:
            x, state = block(x, start)
            states.append(state)
            continue
        read, inputs = mixer.read(block.read_by_mixer(x), start.carried.inputs, None)
        kept = _kept(read[2] + mixer.dt_bias[...][None, None], config, config.layers.index(layer))
        y, h = mixer.scan(*(taken(each, kept) for each in read), start.carried.h, None)
        after = visit(initial_place(len(x)), None, x.shape[1]).place
        x, places = taken(x, kept) + y, taken(places, kept)
        states.append(MixerState(MambaCarry(inputs, h), after))
    x = normalized(model.norm, x, None, None)
    return Decimated(model.outputs(x).logits, places, LanguageModelState(None, tuple(states)))


def _kept(steps: Float[Array, "b t d"], config: DecimateConfig, number: int) -> Int[Array, "b n"]:
    """The places of the tokens that a layer keeps, given step sizes before softplus."""
    size = jnp.linalg.norm(jax.nn.softplus(steps.astype(jnp.float32)), axis=-1)
    time = jnp.arange(size.shape[1], dtype=jnp.int32)[None]
    size = jnp.where(time >= size.shape[1] - config.last, jnp.inf, size)
    return jnp.sort(jax.lax.top_k(size, config.kept(number, size.shape[1]))[1], axis=-1)
