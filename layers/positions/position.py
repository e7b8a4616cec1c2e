"""Positions in attention: an option of its mixers, chosen by name."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.options import Positive, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.positions.clex import Clex, ClexFrequencies, rotated
from layers.positions.relative import alibi_slopes, fire_interpolation, relative_buckets
from layers.positions.rotary import Rotary, rotary
from layers.registry import choose, make_config
from layers.segments import Segments
from layers.typing import Array, Float, Int


@checked_dataclass
class NoPosition:
    """No encoding of position besides causality (NoPE, Kazemnejad et al. 2023, arXiv:2305.19466)."""


@checked_dataclass
class Alibi:
    """Logits decrease linearly with distance, with one slope per head; see `alibi_slopes`."""


@checked_dataclass
class T5Bias:
    """Adds a learned number per head and bucket of relative positions; see `relative_buckets`.

    Each layer learns its own table; in T5 all layers share one.

    Attributes:
      buckets: total number of buckets.
      max_distance: distance from which on all positions share a bucket.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets={self.buckets}; expected a multiple of 4")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"max_distance={self.max_distance}; expected more than half of buckets={self.buckets}"
            )


@checked_dataclass
class Fire:
    """Adds a small network of the relative position, divided by the query's; see `fire_interpolation`.

    Each layer has its own network.

    Attributes:
      width: number of hidden units.
      length: threshold: queries at positions below it, times a learned number, are normalized by it instead of by their
        position.
      curvature: initial value of the learned factor inside the logarithm.
    """

    width: int = 32
    length: Positive = 512.0
    curvature: Positive = 0.1


POSITIONS = {"none": NoPosition, "rope": Rotary, "alibi": Alibi, "t5": T5Bias, "fire": Fire, "clex": Clex}
PositionConfig = NoPosition | Rotary | Alibi | T5Bias | Fire | Clex


def read_position(position: Any) -> PositionConfig:
    """Returns the options that a name, or a mapping with a key "name", stands for.

    Raises:
      ValueError: unknown name or option (with a suggestion), or impossible values.
    """
    if isinstance(position, PositionConfig):
        return position
    options = dict(position) if isinstance(position, Mapping) else {"name": position}
    name = options.pop("name", None)
    return make_config(f"position {name!r}", choose("position", POSITIONS, name), options)


class Position(nnx.Module):
    """Rotates queries and keys, gives slopes, or computes a bias: at most one of the three, by its config.

    `size` is the number of features of a head, width / heads if None. With CLEX, `rotate` takes what `frequencies` or, for a cache,
    `frequencies_until` returns.
    """

    def __init__(
        self,
        config: PositionConfig,
        *,
        width: int,
        heads: int,
        causal: bool,
        size: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.heads, self.causal = config, heads, causal
        if isinstance(config, T5Bias):
            init = nnx.initializers.normal(1 / math.sqrt(width))
            self.table = parameter(rngs, init, (config.buckets, heads), axes=(None, "heads"), **NO_DECAY)
        elif isinstance(config, Fire):
            if not causal:
                raise ValueError("position='fire' divides by the query's position and needs causal=True")
            self.hidden = linear(1, config.width, rngs=rngs)
            self.output = linear(config.width, heads, axes=(None, "heads"), rngs=rngs)
            self.curvature = parameter(rngs, nnx.initializers.constant(config.curvature), (), **NO_DECAY)
            self.multiplier = parameter(rngs, nnx.initializers.ones_init(), (), **NO_DECAY)
        size = width // heads if size is None else size
        self.solved = ClexFrequencies(config, size, rngs=rngs) if isinstance(config, Clex) else None

    def rotate(
        self,
        x: Float[Array, "b t h k"],
        positions: Int[Array, "#b t"],
        frequencies: Float[Array, "#b #t _"] | None = None,
    ) -> Float[Array, "b t h k"]:
        """Returns queries or keys, rotated if positions are rotary; with CLEX, by these `frequencies`."""
        if frequencies is not None:
            return rotated(x, positions, frequencies)
        return rotary(x, positions, self.config) if isinstance(self.config, Rotary) else x

    def frequencies(
        self, positions: Int[Array, "#b t"], segments: Segments | None
    ) -> Float[Array, "#b _ _"] | None:
        """Returns CLEX's angles per token for tokens at these positions of whole segments, or None."""
        return None if self.solved is None else self.solved.of_tokens(positions, segments)

    def frequencies_until(self, rows: int, max_length: int | None) -> Float[Array, "b _"] | None:
        """Returns CLEX's angles per token for rows of as many tokens at most, or None.

        Raises:
          ValueError: CLEX without `max_length`.
        """
        if self.solved is None:
            return None
        if max_length is None:
            raise ValueError(
                "max_length=None, but the frequencies of position='clex' depend on it; expected the most tokens of a row"
            )
        chosen = self.solved()[self.config.factor(max_length) - 1]
        return jnp.broadcast_to(chosen, (rows, *chosen.shape))

    def turn(self, x: Float[Array, "b t h k"], steps: Int[Array, "#b t"]) -> Float[Array, "b t h k"]:
        """Returns rotated queries or keys as they would be so many positions later; as they are if positions are not rotary."""
        if not isinstance(self.config, Rotary):
            return x
        return rotary(x, steps, dataclasses.replace(self.config, amplitude=1.0))

    @property
    def slopes(self) -> Float[Array, "h"] | None:
        """ALiBi's slopes, or None."""
        return jnp.asarray(alibi_slopes(self.heads)) if isinstance(self.config, Alibi) else None

    @property
    def has_bias(self) -> bool:
        """Whether `bias` returns one."""
        return isinstance(self.config, T5Bias | Fire)

    def bias(
        self, q_positions: Int[Array, "b t"], kv_positions: Int[Array, "b s"]
    ) -> Float[Array, "b h t s"]:
        """Returns the bias that T5 and FIRE add to the logits, float32; uses memory b h t s."""
        config = self.config
        if isinstance(config, T5Bias):
            relative = kv_positions[:, None, :] - q_positions[:, :, None]
            bucket = relative_buckets(
                relative,
                bidirectional=not self.causal,
                buckets=config.buckets,
                max_distance=config.max_distance,
            )
            return jnp.moveaxis(self.table[...][bucket], 3, 1)
        place = fire_interpolation(
            q_positions,
            kv_positions,
            curvature=self.curvature[...],
            threshold=jnp.abs(self.multiplier[...]) * config.length,
        )
        return jnp.moveaxis(self.output(jax.nn.relu(self.hidden(place[..., None]))), 3, 1)
