"""One layer of a stack: a mixer, a channel mixer, norms and residual connections."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.adapters import dropping
from layers.channel import make_channel_mixer
from layers.dropout import dropout
from layers.mixer import Source
from layers.mixers import make_mixer
from layers.norms import make_norm
from layers.segments import SegmentIds, Segments, visit
from layers.typing import Array, Float, Int, Key
from seqmodels.config import StackConfig
from seqmodels.reversible import doubled


class Encoded(NamedTuple):
    """The output of an encoder, which all layers of a decoder read, and its segments; None for whole rows."""

    x: Float[Array, "b s d"]
    segments: Segments | None


class Block(nnx.Module):
    """A layer of a stack.

    Separate residuals, pre-norm (post-norm normalizes the sums instead, "output" and "both" the outputs of branches, and "stream"
    x itself before each branch):

        x = x + dropout(mixer(norm(x)))
        x = x + dropout(channel(norm(x)))

    Joint residual: x = x + channel(mixer(norm(x))). Parallel residual: x = x + mixer(norm(x)) + channel(norm(x)), where
    both norms may be one. Reversible residual: x_1 = x_1 + mixer(norm(x_2)), then x_2 = x_2 + channel(norm(x_1)), where x is both side
    by side. Each x before a plus is multiplied by `residual_scale`, and each branch after one by `branch_scale`.

    With a cross-attention, a layer of a decoder has a third branch between these two, x = x + dropout(cross(norm(x), source)).

    Attributes:
      use: what this layer's use of a shared block has of its own (`seqmodels.shared.Use`), which the stack sets and runs; or None.
    """

    def __init__(
        self, config: StackConfig, layer: int, *, cross: Mapping[str, Any] | None = None, rngs: nnx.Rngs
    ):
        self.config = config
        given = {"width": config.width, "dtype": jnp.dtype(config.dtype)}
        given |= {"layer": layer, "depth": config.depth}
        mixer, options = config.mixer_of(layer)
        self.mixer = make_mixer(mixer, options, given={**config.mixer_defaults, **given}, rngs=rngs)
        before = config.norm_position != "output"
        after = config.norm_position in ("output", "both")
        self.mixer_norm = self._norm(rngs) if before else None
        self.mixer_output_norm = self._norm(rngs) if after else None
        if cross is None:
            self.cross = self.cross_norm = self.cross_output_norm = None
        else:
            self.cross = make_cross(cross, given={**config.mixer_defaults, **given}, rngs=rngs)
            self.cross_norm = self._norm(rngs) if before else None
            self.cross_output_norm = self._norm(rngs) if after else None
        self.use: nnx.Module | None = nnx.data(None)
        channel = config.channel_of(layer)
        if channel is None:
            self.channel = self.channel_norm = self.channel_output_norm = None
            return
        inside = {"dropout": config.dropout} if config.residual == "joint" else {}
        self.channel = make_channel_mixer(*channel, given=given | inside, rngs=rngs)
        own = config.residual != "joint"
        self.channel_norm = self._norm(rngs) if own and before and not config.shared_norm else None
        self.channel_output_norm = self._norm(rngs) if own and after else None

    def source(self, encoded: Encoded) -> Source:
        """Returns what the cross-attention of this layer reads of a source."""
        return self.cross.source(encoded.x, segment_ids=encoded.segments)

    def _norm(self, rngs: nnx.Rngs) -> nnx.Module:
        config = self.config
        options = dict(config.norm_options)
        return make_norm(config.norm, options, width=config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: Any = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the output of the layer and the mixer's state. A key means training."""
        x, state, _ = self.sharing(x, state, None, segment_ids=segment_ids, key=key)
        return x, state

    def alone(self, x: Float[Array, "b t d"]) -> Float[Array, "b t _"]:
        """Returns the output of the layer without its model, with x as source too; see `Mixer.alone`."""
        if self.config.residual == "reversible":
            x = doubled(x)
        source = None if self.cross is None else Encoded(x, None)
        return self.sharing(x, None, x if self.mixer.takes_values else None, source=source)[0]

    def branch(
        self,
        name: Literal["mixer", "channel"],
        x: Float[Array, "b t d"],
        segments: Segments | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Returns what a branch of a reversible layer adds to one stream, given the other one."""
        with dropping(key):
            return self._branch(name, x, None, segments, key)[0]

    def _branch(self, name, x, state, segments, key):
        mask = None if segments is None else segments.real
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        norm, out = self.mixer_norm if name == "mixer" else self.channel_norm, [state, None]
        u = norm(x, mask=mask, training=key is not None)
        if name == "mixer":
            y, *out = self.mixer.sharing(u, state, None, segment_ids=segments)
            y = dropout(y, self.config.dropout, keys[0])
        else:
            y = self._channelled(u, mask, keys)
        return y.astype(x.dtype), *out

    def _channelled(self, u, mask, keys):
        return dropout(self.channel(u, mask=mask, key=keys[1]), self.config.dropout, keys[2])

    def read_by_mixer(self, x: Float[Array, "b t _"]) -> Float[Array, "b t d"]:
        """Returns what the mixer reads of the stream x, in inference and without padding."""
        if self.config.residual == "reversible":
            x = jnp.split(x, 2, axis=-1)[1]
        norm = None if self.config.norm_position == "post" else self.mixer_norm
        return x if norm is None else norm(x, mask=None, training=False)

    def sharing(
        self,
        x: Float[Array, "b t d"],
        state: Any,
        values: Float[Array, "b t d"] | None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
        beside: Float[Array, "b t d"] | None = None,
        source: Encoded | Source | None = None,
    ) -> tuple[Float[Array, "b t d"], Any, Float[Array, "b t d"] | None]:
        """Returns the output of the layer, the mixer's state and the values for later layers; see `Mixer.sharing`.

        Args:
          beside: what the branch of the mixer reads in addition to x: x + mixer(norm(x + beside)).
          source: what the cross-attention reads, or what `source` returns for it.
        """
        with dropping(key):
            return self._sharing(x, state, values, Segments.of(segment_ids), key, beside, source)

    def _sharing(self, x, state, values, segments, key, beside, source):
        if self.config.residual == "reversible":
            first, second = jnp.split(x, 2, axis=-1)
            y, *out = self._branch("mixer", second, state, segments, key)
            first = first + y
            y, *_ = self._branch("channel", first, None, segments, key)
            return jnp.concatenate([first, second + y], axis=-1), *out
        mask = None if segments is None else segments.real
        norms = {"mask": mask, "training": key is not None}
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        post, stream = (self.config.norm_position == position for position in ("post", "stream"))
        scale, branch_scale = self.config.residual_scale, self.config.branch_scale

        def add(x, y, norm):
            total = (x if scale == 1 else scale * x) + (y if branch_scale == 1 else branch_scale * y)
            return norm(total, **norms) if post else total

        def before(x, norm):
            return norm(x, **norms) if stream else x

        def branch(f, x, norm, output_norm):
            y, out = f(x if post or stream or norm is None else norm(x, **norms))
            return (y if output_norm is None else output_norm(y, **norms)), out

        def mix(u):
            y, *out = self.mixer.sharing(u, state, values, segment_ids=segments)
            if self.config.residual == "joint":
                return self.channel(y, mask=mask, key=keys[0]), out
            return dropout(y, self.config.dropout, keys[0]), out

        def cross(u):
            there = self.source(source) if isinstance(source, Encoded) else source
            y = self.cross.cross(u, there, numbers=_numbers(state, segments, u.shape[1]))
            # Not a key of another dropout.
            own = None if key is None else jax.random.fold_in(key, 3)
            return dropout(y, self.config.dropout, own), None

        def channel(u):
            return self._channelled(u, mask, keys), None

        x = before(x, self.mixer_norm)
        read = x if beside is None else x + beside
        mixed, out = branch(mix, read, self.mixer_norm, self.mixer_output_norm)
        last = self.mixer_norm
        if self.cross is not None:
            x = before(add(x, mixed, last), self.cross_norm)
            mixed, _ = branch(cross, x, self.cross_norm, self.cross_output_norm)
            last = self.cross_norm
        if self.channel is None or self.config.residual == "joint":
            return add(x, mixed, last), *out
        if self.config.residual == "separate":
            x = before(add(x, mixed, last), self.channel_norm)
        channel_norm = self.mixer_norm if self.config.shared_norm else self.channel_norm
        y, _ = branch(channel, x, channel_norm, self.channel_output_norm)
        if self.config.residual == "parallel":
            y = mixed + y
        return add(x, y, self.channel_norm), *out


def make_cross(options: Mapping[str, Any], *, given: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    """Returns the mixer of a cross-attention, "attention" unless the options have a key "mixer"."""
    options = dict(options)
    name = options.pop("mixer", "attention")
    plain = {"causal": False, "position": "none", "window": None, "sink_tokens": 0}
    mixer = make_mixer(name, options, given={**given, **plain}, rngs=rngs)
    if "causal_cross" not in mixer.patterns:
        raise ValueError(
            f"cross.mixer={name!r} reads no source; expected a mixer with the pattern 'causal_cross', such as 'attention'"
        )
    return mixer


def _numbers(state: Any, segments: Segments | None, time: int) -> Int[Array, "b t"] | None:
    """Returns the segments of new tokens, counted over all calls; None for one segment per row."""
    if state is not None:
        return visit(state.place, segments, time).numbers
    return None if segments is None else segments.numbers
