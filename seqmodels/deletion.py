"""Tokens that leave an encoder in inference, softly in training: MrT5 (Kallini et al. 2025, arXiv:2410.20771)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.options import Count, NonNegative, Positive, UnitInterval, checked_dataclass
from layers.parameters import AuxiliaryLoss
from layers.reduction import DeletionGate, DeletionGateConfig, remaining
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class DeletionConfig:
    """Options of the deletion of tokens in an encoder.

    Attributes:
      layer: the gate reads the input of this layer, from 0. The authors train with 3, of 12.
      target: part of the real tokens that is to be deleted, to which the factor on the mean gate in the loss is controlled; None for
        a factor that stays.
      weight: this factor, without a target.
      proportional, integral: gains of the controller.
      strength: -K, the most that a gate takes from logits. Logits of T5 have no scale, so that it must exceed large ones.
      room: the most tokens that stay in inference, as a part of the length of a row; later ones leave too. What is below 1 saves
        computation.
    """

    layer: Count
    target: UnitInterval | None = None
    weight: NonNegative | None = None
    proportional: NonNegative = 0.5
    integral: NonNegative = 1e-5
    strength: Positive = 30.0
    room: UnitInterval = 1.0

    def __post_init__(self) -> None:
        if (self.target is None) == (self.weight is None):
            raise ValueError(
                f"deletion.target={self.target} and deletion.weight={self.weight}; expected one of the two: the part of tokens that "
                "is deleted, or a factor in the loss"
            )
        if self.room == 0:
            raise ValueError("deletion.room=0.0; expected more than 0, the part of a row that may stay")


class Deletion(nnx.Module):
    """A `DeletionGate` between two layers of an encoder, with its loss and the controller of its factor.

        G_j = K sigmoid(-(w . norm(x_j) + b))

    In training G_j is added to the logits of the key j in all later layers and in the cross-attention of the decoder, and the loss gains
    a mean_j G_j over real tokens. With a target d and the part d_n of real tokens with G < K / 2 in step n, the factor of the next step is

        a = max(0, p_n + i_n),   p_n = 0.9 p_{n-1} + 0.1 k_p (d - d_n),   i_n = i_{n-1} + k_i (d - d_n)

    from p = i = 0. Equal gates of all tokens cancel in a softmax, so that nothing holds a model that deletes everything; the option
    `sink_logits` of `attention`, in the encoder and as `cross`, makes that cost the loss. In inference tokens with G <= K / 2 leave, the others are not gated, and later layers see the positions that they had.
    """

    def __init__(self, config: DeletionConfig, *, width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        gate = DeletionGateConfig(width, strength=config.strength, dtype=dtype)
        self.gate = DeletionGate(gate, rngs=rngs)
        self.terms = nnx.BatchStat(jnp.zeros(2, jnp.float32)) if config.weight is None else None
        self.auxiliary = AuxiliaryLoss(jnp.zeros((), jnp.float32))

    @property
    def factor(self) -> Float[Array, ""]:
        """The factor a on the mean gate."""
        if self.terms is None:
            return jnp.asarray(self.config.weight, jnp.float32)
        return jnp.maximum(0.0, self.terms[...].sum())

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments | None, *, training: bool
    ) -> tuple[Float[Array, "b n d"], tuple[Segments, Segments]]:
        """Returns the tokens that go on, and their segments for mixers that go by neighbours and for those that read positions."""
        gates = self.gate(x, segment_ids=segments)
        if not training:
            size = math.ceil(self.config.room * x.shape[1])
            left = remaining(self.gate.kept(gates), max(size, 1), segment_ids=segments)
            return left.take(x), (left.segments, left.placed)
        self.auxiliary[...] = jax.lax.stop_gradient(self.factor) * self.gate.share(
            gates, segment_ids=segments
        )
        if segments is None:
            segments = Segments.of(jnp.ones(gates.shape, jnp.int32), padding="end", packed=False)
        if self.terms is not None:
            real = segments.real
            rate = jnp.sum(real & (gates < -self.config.strength / 2)) / jnp.maximum(real.sum(), 1)
            error, (p, i) = self.config.target - rate, self.terms[...]
            gain = 0.1 * self.config.proportional
            self.terms[...] = jnp.stack([0.9 * p + gain * error, i + self.config.integral * error])
        gated = dataclasses.replace(segments, gates=gates)
        return x, (gated, gated)
