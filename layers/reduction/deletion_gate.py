"""MrT5's deletion gate: tokens that leave the encoder after an early layer (Kallini et al. 2025, arXiv:2410.20771)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, Count, NonNegative, Positive, checked_dataclass
from layers.parameters import linear, xavier_uniform
from layers.reduction.kept import kept_segments, places_of, returned, taken
from layers.segments import SegmentIds, Segments, select_real
from layers.typing import Array, Bool, Float, Int, Num


@checked_dataclass
class DeletionGateConfig:
    """Options of `DeletionGate`.

    Attributes:
      width: d, number of features.
      strength: -K, the most that a gate takes from logits.
      epsilon: epsilon of the norm.
      dtype: dtype of the activations.
    """

    width: int
    strength: Positive = 30.0
    epsilon: NonNegative = 1e-6
    dtype: ActivationDtype = jnp.float32


class DeletionGate(nnx.Module):
    """A gate per token between 0, which keeps it, and K < 0, which deletes it: G = K sigmoid(-(w . norm(x) + b)).

    In training, nothing leaves: G of the key is added to every logit of attention in later layers and in the cross-attention of a decoder
    (`layers.kernels.attention.Logits(bias=gates[:, None, None, :])`), and the loss has alpha times `share`. In inference, tokens with
    G <= K / 2 leave: `remaining(kept(gates), ...)`. b starts at 1, so that most tokens stay;
    norm is RMSNorm, as in T5 and the authors' code.
    """

    def __init__(self, config: DeletionGateConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm = RMSNorm(NormConfig(config.width, config.epsilon, dtype=config.dtype), rngs=rngs)
        self.gate = linear(
            config.width, 1, axes=("embed", None), init=xavier_uniform(), dtype=config.dtype, rngs=rngs
        )
        self.gate.bias.set_value(jnp.ones_like(self.gate.bias[...]))

    def __call__(self, x: Float[Array, "b t d"], *, segment_ids: SegmentIds = None) -> Float[Array, "b t"]:
        """Returns the float32 gates; K at padding."""
        segments = Segments.of(segment_ids)
        score = self.gate(self.norm(select_real(x, segments)))[..., 0].astype(jnp.float32)
        gates = -self.config.strength * jax.nn.sigmoid(-score)
        return gates if segments is None else jnp.where(segments.real, gates, -self.config.strength)

    def kept(self, gates: Float[Array, "b t"]) -> Bool[Array, "b t"]:
        """Returns which tokens stay in inference."""
        return gates > -self.config.strength / 2

    def share(self, gates: Float[Array, "b t"], *, segment_ids: SegmentIds = None) -> Float[Array, ""]:
        """Returns the mean gate of real tokens, which the loss of training takes with a factor: lower deletes more."""
        segments = Segments.of(segment_ids)
        real = jnp.ones(gates.shape, bool) if segments is None else segments.real
        return jnp.sum(gates, where=real) / jnp.maximum(real.sum(), 1)


class Remaining(NamedTuple):
    """The tokens that remain of rows.

    Attributes:
      places: their places (b, n), in order; t where a row has fewer.
      segments: their segments, with positions without gaps.
      placed: their segments, with the positions that they had, as biases of relative positions need them.
    """

    places: Int[Array, "b n"]
    segments: Segments
    placed: Segments

    def take(self, x: Num[Array, "b t *f"], fill: int = 0) -> Num[Array, "b n *f"]:
        """Returns what x holds for the remaining tokens, such as vectors or labels; `fill` at padding."""
        return taken(x, self.places, fill)

    def restore(self, x: Num[Array, "b t *f"], y: Num[Array, "b n *f"]) -> Num[Array, "b t *f"]:
        """Returns x with y in the places of the remaining tokens."""
        return returned(x, y, self.places)


def remaining(kept: Bool[Array, "b t"], size: Count, *, segment_ids: SegmentIds = None) -> Remaining:
    """Returns the first `size` tokens of each row that are kept and are no padding; later ones leave too.

    Raises:
      ValueError: the size is below 1, or tokens are not evenly spaced.
    """
    if size < 1:
        raise ValueError(f"size={size}; expected at least 1, the most tokens that remain of a row")
    segments = Segments.of(segment_ids)
    places = places_of(kept if segments is None else kept & segments.real, size)
    return Remaining(places, *kept_segments(places, kept.shape[1], segments))
