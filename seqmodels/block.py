"""One layer of a stack: a mixer, a channel mixer, norms and residual connections."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.adapters import dropping
from layers.channel import make_channel_mixer
from layers.dropout import dropout
from layers.mixers import make_mixer
from layers.norms import make_norm
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Key
from seqmodels.config import StackConfig


class Block(nnx.Module):
    """A layer of a stack.

    Separate residuals, pre-norm (post-norm normalizes the sums instead, "output" and "both" the outputs of branches, and "stream"
    x itself before each branch):

        x = x + dropout(mixer(norm(x)))
        x = x + dropout(channel(norm(x)))

    Joint residual: x = x + channel(mixer(norm(x))). Parallel residual: x = x + mixer(norm(x)) + channel(norm(x)), where
    both norms may be one. Each x
    before a plus is multiplied by `residual_scale`, and each branch after one by `branch_scale`.

    Attributes:
      use: what this layer's use of a shared block has of its own (`seqmodels.shared.Use`), which the stack sets and runs; or None.
    """

    def __init__(self, config: StackConfig, layer: int, *, rngs: nnx.Rngs):
        self.config = config
        given = {"width": config.width, "dtype": jnp.dtype(config.dtype)}
        given |= {"layer": layer, "depth": config.depth}
        mixer, options = config.mixer_of(layer)
        self.mixer = make_mixer(mixer, options, given={**config.mixer_defaults, **given}, rngs=rngs)
        before = config.norm_position != "output"
        after = config.norm_position in ("output", "both")
        self.mixer_norm = self._norm(rngs) if before else None
        self.mixer_output_norm = self._norm(rngs) if after else None
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

    def alone(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the output of the layer without its model; see `Mixer.alone`."""
        return self.sharing(x, None, x if self.mixer.takes_values else None)[0]

    def read_by_mixer(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns what the mixer reads of the stream x, in inference and without padding."""
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
    ) -> tuple[Float[Array, "b t d"], Any, Float[Array, "b t d"] | None]:
        """Returns the output of the layer, the mixer's state and the values for later layers; see `Mixer.sharing`.

        Args:
          beside: what the branch of the mixer reads in addition to x: x + mixer(norm(x + beside)).
        """
        with dropping(key):
            return self._sharing(x, state, values, Segments.of(segment_ids), key, beside)

    def _sharing(self, x, state, values, segments, key, beside):
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

        def channel(u):
            return dropout(self.channel(u, mask=mask, key=keys[1]), self.config.dropout, keys[2]), None

        x = before(x, self.mixer_norm)
        read = x if beside is None else x + beside
        mixed, out = branch(mix, read, self.mixer_norm, self.mixer_output_norm)
        if self.channel is None or self.config.residual == "joint":
            return add(x, mixed, self.mixer_norm), *out
        if self.config.residual == "separate":
            x = before(add(x, mixed, self.mixer_norm), self.channel_norm)
        channel_norm = self.mixer_norm if self.config.shared_norm else self.channel_norm
        y, _ = branch(channel, x, channel_norm, self.channel_output_norm)
        if self.config.residual == "parallel":
            y = mixed + y
        return add(x, y, self.channel_norm), *out
