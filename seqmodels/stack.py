"""A pattern of blocks cycled over the depth."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.segments import SegmentIds
from layers.typing import Array, Float, Key
from seqmodels.block import Block
from seqmodels.config import StackConfig

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nnx.Module):
    """`depth` blocks. Parameters are held layer by layer, so that a checkpoint does not depend on `scan`.

    Under scan the parameters of the repeats are stacked on the fly: a copy of them a step, in exchange for compiling
    the pattern once. Calls with a state are unrolled, as stacking would copy the states.
    """

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.blocks = nnx.List(Block(config, layer, rngs=rngs) for layer in range(config.depth))

    @property
    def causal(self) -> bool:
        """Whether no output depends on later inputs."""
        return all(block.mixer.causal for block in self.blocks)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> tuple[Any, ...]:
        """The initial state of every layer; `max_length` bounds the tokens that caches must hold."""
        return tuple(block.mixer.init_state(batch_size, max_length=max_length) for block in self.blocks)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: tuple[Any, ...] | None = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[Any, ...] | None]:
        """Runs all layers. A key means training."""
        config = self.config
        keys = None if key is None else jax.random.split(key, config.depth)
        if state is not None:
            states = []
            for layer, block in enumerate(self.blocks):
                layer_key = None if keys is None else keys[layer]
                x, new = block(x, state[layer], segment_ids=segment_ids, key=layer_key)
                states.append(new)
            return x, tuple(states)
        period = len(config.pattern)
        repeats = config.depth // period if config.scan else 0
        if repeats > 1:
            x = self._scan(x, segment_ids, keys, period, repeats)
        else:
            repeats = 0
        for layer in range(repeats * period, config.depth):
            x = self._one(x, segment_ids, keys, layer)
        return x, None

    def _one(self, x, segment_ids, keys, layer):
        """One layer outside the scan."""
        graph, params, rest = nnx.split(self.blocks[layer], nnx.Param, ...)
        run = self._rematerialised(_run_blocks)
        x, (rest,) = run(
            x, ((params, rest),), segment_ids, None if keys is None else keys[layer : layer + 1], (graph,)
        )
        if keys is not None:
            nnx.update(self.blocks[layer], rest)
        return x

    def _scan(self, x, segment_ids, keys, period, repeats):
        """All whole repeats of the pattern under one scan."""
        graphs, stacked = [], []
        for place in range(period):
            split = [nnx.split(self.blocks[place + r * period], nnx.Param, ...) for r in range(repeats)]
            graphs.append(split[0][0])
            stacked.append(
                tuple(jax.tree.map(lambda *v: jnp.stack(v), *(s[part] for s in split)) for part in (1, 2))
            )
        if keys is not None:
            keys = keys[: repeats * period].reshape(repeats, period, *keys.shape[1:])
        run = self._rematerialised(_run_blocks)

        def body(x, layers):
            variables, keys = layers
            return run(x, variables, segment_ids, keys, tuple(graphs))

        x, rests = jax.lax.scan(body, x, (tuple(stacked), keys))
        # Only training changes statistics; writing them back otherwise would make inference impure.
        for place, rest in enumerate(rests if keys is not None else ()):
            for r in range(repeats):
                nnx.update(self.blocks[place + r * period], jax.tree.map(lambda v, r=r: v[r], rest))
        return x

    def _rematerialised(self, run):
        """`run` with the checkpoint policy of the config."""
        if self.config.remat == "none":
            return run
        return jax.checkpoint(run, policy=_POLICIES[self.config.remat], static_argnums=(4,))


def _run_blocks(x, variables, segment_ids, keys, graphs):
    """Runs a few blocks given as (params, rest) pairs; returns x and the rests, which norms may have updated."""
    rests = []
    for place, (graph, (params, rest)) in enumerate(zip(graphs, variables, strict=True)):
        block = nnx.merge(graph, params, rest)
        x, _ = block(x, segment_ids=segment_ids, key=None if keys is None else keys[place])
        rests.append(nnx.split(block, nnx.Param, ...)[2])
    return x, tuple(rests)
