"""Tuned state: any recurrent mixer with a trained state before the first token (Lemerle et al. 2024, arXiv:2410.23320)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers import mixers
from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.parameters import declared
from layers.parts.each_segment import is_within, mix_each_segment
from layers.segments import Segments, keep_where
from layers.typing import Array, Bool, Float


@checked_dataclass
class TunedStateConfig:
    """Options of `TunedState`.

    Attributes:
      width: d, number of input and output features.
      inner: name of a recurrent mixer, whose state has a fixed size and starts at zero. (The key "mixer" marks an alias in a
        model's config.)
      options: options of that mixer.
      layer, depth: index of the layer and number of layers of the model, passed to the mixer.
      dtype: dtype of the activations.
    """

    width: int
    inner: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32


class TunedState(Mixer):
    """A mixer whose segments start from a trained state (initial-state tuning; Lemerle et al. 2024, arXiv:2410.23320).

        y, S = F(x, S),   S_0 a parameter in place of zero

    for any recurrent mixer F. Training S_0 alone, with all else frozen, adapts a model to a voice, a style or a task at the
    cost of no token. The parameters of S_0 start at zero and are in the group "no_decay/start", to which an experiment can
    give a learning rate of its own; the inner mixer keeps its names below `inner`. In packed rows every segment is mixed by
    itself, as its start is not what the primitives reset to: one pass per segment of the fullest row.
    """

    def __init__(self, config: TunedStateConfig, *, rngs: nnx.Rngs):
        self.config = config
        given = {name: getattr(config, name) for name in ("width", "layer", "depth", "dtype")}
        self.inner = mixers.make_mixer(config.inner, config.options, given=given, rngs=rngs)
        if not self.inner.causal or self.inner.keeps_segments:
            raise ValueError(
                f"inner={config.inner!r} with options={dict(config.options)} has no recurrent state to train; "
                "choose a mixer whose state has a fixed size, such as 'gla', 'mamba2' or 'gated_deltanet'"
            )
        shapes = jax.eval_shape(lambda: self.inner.initial(1, None))
        self.start = nnx.List(_parameter(leaf) for leaf in jax.tree.leaves(shapes))

    def initial(self, batch_size: int, max_length: int | None) -> Any:
        leaves, tree = jax.tree.flatten(self.inner.initial(batch_size, max_length))
        offsets = (_as_state(start[...], leaf) for start, leaf in zip(self.start, leaves, strict=True))
        return jax.tree.unflatten(tree, [leaf + offset for leaf, offset in zip(leaves, offsets, strict=True)])

    def mix(
        self, x: Float[Array, "b t d"], carried: Any, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Any]:
        start = self.initial(x.shape[0], None)
        first = start if carried is None else carried
        if segments is None or not segments.packed or x.shape[1] == 0:
            return self.inner.mix(x, first, segments)
        later = self._alone(x, start, segments)
        if carried is None:
            return later, None
        opening = segments.numbers <= 1
        y, after = self.inner.mix(x, first, _where(opening, segments))
        last = segments.numbers.max(1, keepdims=True)
        _, ended = self.inner.mix(x, start, _where(segments.numbers == last, segments))
        after = keep_where(last[:, 0] <= 1, after, ended)
        return jnp.where(opening[..., None], y, later), after

    def _alone(self, x: jax.Array, start: Any, segments: Segments) -> jax.Array:
        """Returns the outputs of every segment when it begins at the trained state."""
        graph, variables = nnx.split(self.inner)

        def mix(weights, x, lengths):
            variables, start = weights
            real = is_within(lengths, x.shape[1]).astype(jnp.int32)
            alone = Segments.of(real, padding="end", packed=False)
            return nnx.merge(graph, variables, copy=True).mix(x, start, alone)[0]

        return mix_each_segment(mix, (variables, start), x, segment_ids=segments)


def _parameter(leaf: jax.ShapeDtypeStruct) -> nnx.Param:
    """Returns zeros for one array of the state; complex ones have an axis for real and imaginary part in front."""
    pair = (2,) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else ()
    shape = leaf.shape[1:]
    axes = (None,) * len(pair) + ("state",) + (None,) * (len(shape) - 1)
    return declared(jnp.zeros((*pair, *shape), jnp.float32), group="no_decay/start", axes=axes)


def _as_state(start: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns a parameter as one array of the state of a batch of 1."""
    if jnp.iscomplexobj(leaf):
        start = jax.lax.complex(start[0], start[1])
    return start[None].astype(leaf.dtype)


def _where(own: Bool[Array, "b t"], segments: Segments) -> Segments:
    """Returns one segment per row, with all other tokens as padding."""
    return Segments.of((own & segments.real).astype(jnp.int32), packed=False)
