"""What several layers share: blocks with adapters for each use, as in Zamba2 (Glorioso et al. 2024, arXiv:2411.15242), and tables."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.adapters import LowRank
from layers.channel import make_channel_mixer
from layers.mixers import make_mixer
from layers.norms import make_norm
from layers.parameters import AuxiliaryLoss, Linear, axes_of, declared, linear
from layers.segments import Segments
from layers.typing import Array, Float
from seqmodels.config import StackConfig
from seqmodels.shared_config import SharedConfig


class SharedBlock(nnx.Module):
    """What several layers read beside the residual stream, from one set of parameters.

        u = [x, e]                              (2 d)
        y = channel(norm(P mixer(norm(u))))     (d)

    e is what enters the stack, so that late layers see the tokens themselves; the mixer has the width 2 d. Each use has a
    state of its own.

    Raises:
      ValueError: a norm or the channel mixer changes variables in training.
    """

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        shared, width, dtype = config.shared, config.width, jnp.dtype(config.dtype)
        given = {"dtype": dtype, "depth": config.depth}
        options = dict(shared.mixer)
        name = options.pop("mixer", "attention")
        self.mixer = make_mixer(name, options, given={**given, "width": 2 * width}, rngs=rngs)
        self.projection = linear(
            2 * width, width, axes=("inner", "embed"), bias=False, dtype=dtype, rngs=rngs
        )
        options = dict(shared.channel)
        name = options.pop("channel", "swiglu")
        self.channel = make_channel_mixer(name, options, given={**given, "width": width}, rngs=rngs)
        norms = {"dtype": dtype, "rngs": rngs}
        if shares_table(self):
            raise ValueError(
                f"shared.channel={name!r} has shared_table=True, and layers share the whole block; expected shared_table=False"
            )
        self.mixer_norm = make_norm(config.norm, dict(config.norm_options), width=2 * width, **norms)
        self.channel_norm = make_norm(config.norm, dict(config.norm_options), width=width, **norms)
        if jax.tree.leaves(nnx.state(self, nnx.Any(nnx.BatchStat, AuxiliaryLoss))):
            raise ValueError(
                f"norm={config.norm!r} and shared.channel={name!r} keep statistics or losses of each layer; a shared block takes "
                "parts without, such as 'rms_norm' and 'swiglu'"
            )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        entered: Float[Array, "b t d"],
        state: Any = None,
        *,
        segment_ids: Segments | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns y for the stream x and what entered the stack, and the state of the mixer."""
        mask = None if segment_ids is None else segment_ids.real
        u = self.mixer_norm(jnp.concatenate([x, entered], axis=-1), mask=mask)
        y, state = self.mixer(u, state, segment_ids=segment_ids)
        return self.channel(self.channel_norm(self.projection(y), mask=mask), mask=mask), state


class Use(nnx.Module):
    """What a use of a shared block has of its own: the map W of its output, and low-rank adapters of its linear maps.

        h = W y

    An adapter of several maps, "channel/gate+channel/up", has one factor A for all and a factor B of all their outputs.
    """

    def __init__(self, config: StackConfig, block: SharedBlock, *, rngs: nnx.Rngs):
        shared, width = config.shared, config.width
        options = {"axes": ("embed", "embed"), "bias": False, "dtype": jnp.dtype(config.dtype)}
        self.output = linear(width, width, **options, rngs=rngs)
        self.names = shared.adapters
        self.adapters = nnx.List(_adapter(shared, block, names, rngs) for names in shared.adapters)

    def __call__(
        self,
        block: SharedBlock,
        x: Float[Array, "b t d"],
        entered: Float[Array, "b t d"],
        state: Any = None,
        *,
        segment_ids: Segments | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns h of this use of a block, and the state of its mixer; see `SharedBlock`."""
        y, state = self.adapted(block)(x, entered, state, segment_ids=segment_ids)
        return self.output(y), state

    def adapted(self, block: SharedBlock) -> SharedBlock:
        """Returns the block with the adapters of this use; the arrays are shared."""
        own = nnx.merge(*nnx.split(block))
        for names, adapter in zip(self.names, self.adapters, strict=True):
            start = 0
            for name in names.split("+"):
                module = _linear(own, name)
                end = start + module.kernel.shape[-1]
                module.adapter = _joined(adapter.a[...], adapter.b[...][:, start:end], module.adapter)
                start = end
        return own


def _adapter(config: SharedConfig, block: SharedBlock, names: str, rngs: nnx.Rngs) -> LowRank:
    """Returns a new adapter that adds nothing yet, of the scale 1."""
    maps = [_linear(block, name) for name in names.split("+")]
    sizes = {module.kernel.shape[0] for module in maps}
    if len(sizes) > 1:
        raise ValueError(
            f"shared.adapters has {names!r}, whose maps have {sorted(sizes)} inputs; expected one number"
        )
    inputs, outputs = sizes.pop(), sum(module.kernel.shape[1] for module in maps)
    if config.rank > min(inputs, outputs):
        raise ValueError(
            f"shared.rank={config.rank} for {names} of {inputs} inputs and {outputs} outputs; expected at most "
            f"{min(inputs, outputs)}"
        )
    axes = axes_of(maps[0].kernel)
    a = nnx.initializers.lecun_normal()(rngs.params(), (inputs, config.rank), jnp.float32)
    return LowRank(
        declared(a, axes=(axes[0], None)),
        declared(jnp.zeros((config.rank, outputs), jnp.float32), axes=(None, axes[1])),
        alpha=float(config.rank),
        stabilized=False,
    )


def _joined(a: jax.Array, b: jax.Array, other: LowRank | None) -> LowRank:
    """Returns an adapter of the scale 1 that adds A B, and what another adapter of the same map adds."""
    if other is not None:
        a = jnp.concatenate([a, other.a[...]], axis=-1)
        b = jnp.concatenate([b, other.scale * other.b[...]], axis=0)
    return LowRank(nnx.Param(a), nnx.Param(b), alpha=float(a.shape[-1]), stabilized=False)


def _linear(block: SharedBlock, name: str) -> Linear:
    """Returns a linear map of a block by its name, or raises ValueError."""
    found = reduce(lambda module, part: getattr(module, part, None), name.split("/"), block)
    if isinstance(found, Linear):
        return found
    known: Mapping[str, Linear] = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(block)
        if isinstance(module, Linear)
    }
    raise ValueError(
        f"shared.adapters has {name!r}, which is no linear map of the block; it has {', '.join(sorted(known))}"
    )


def shares_table(block: nnx.Module) -> bool:
    """Returns whether the channel mixer of a block reads a table that it shares with other layers."""
    return getattr(getattr(block.channel, "config", None), "shared_table", False)


def share_tables(blocks: Sequence[nnx.Module]) -> None:
    """Makes all channel mixers with a shared table hold the variables of the first one: its gradient is the sum over them."""
    sharing = [block.channel for block in blocks if shares_table(block)]
    for channel in sharing[1:]:
        channel.share(sharing[0])
