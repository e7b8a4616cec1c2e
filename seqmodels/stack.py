"""A stack of blocks: a pattern repeated over the depth."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels import kept
from layers.mixer import Mixer, Source
from layers.parameters import axes_of
from layers.reduction.kept import kept_segments, returned, taken
from layers.segments import SegmentIds, Segments, select_real
from layers.sharding import divide_batch
from layers.typing import Array, Float, Key
from seqmodels import reversible
from seqmodels.block import Block, Encoded
from seqmodels.config import StackConfig
from seqmodels.deletion import Deletion, DeletionConfig
from seqmodels.recording import is_recording, record
from seqmodels.routing import kept_tokens
from seqmodels.shared import SharedBlock, Use, share_tables, shares_table
from seqmodels.stretching import stretched

# What the backward pass of a scan computes again rather than reads: one pass over memory gives many of these at once,
# while a scan would write each result of each layer. Layers that are not scanned leave that choice to the compiler.
_CHEAP = frozenset(
    [
        "abs",
        "add",
        "and",
        "broadcast_in_dim",
        "clamp",
        "concatenate",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "erf",
        "exp",
        "exp2",
        "expand_dims",
        "expm1",
        "ge",
        "gt",
        "integer_pow",
        "iota",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pad",
        "pow",
        "reshape",
        "rsqrt",
        "select_n",
        "sign",
        "slice",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "stop_gradient",
        "sub",
        "tanh",
        "transpose",
    ]
)


def _all_but_cheap(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _CHEAP


_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": kept.policy,
}


class Stack(nnx.Module):
    """`depth` blocks whose kinds repeat a pattern of length p.

    With `scan`, the variables of whole repeats of the pattern are created stacked: `stacked[i]` is one block whose
    variables have a leading axis of repeats, for layers i, i + p, i + 2 p, ... They run under `jax.lax.scan`, which
    compiles the pattern once. `blocks` holds the remaining layers separately, which are all if some read values or a table of an
    earlier one.

    Layers of `config.shared` also read what a shared block makes of x and of the input of the stack. `shared` holds these blocks,
    and each of the layers what its use has of its own, `use`. Then all layers run one by one, and the states of the uses follow
    those of the layers.

    With `cross`, options of a cross-attention, it is the stack of a decoder: each layer also reads a source. With `deletion`, tokens leave
    before one of its layers; then it is called by `encode`.

    The metadata `layers` of each variable lists the layers that it belongs to, so that checkpoints name it by layer and
    do not depend on `scan`.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        cross: Mapping[str, Any] | None = None,
        deletion: DeletionConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.reads_source = config, cross is not None
        blocks = [Block(config, layer, cross=cross, rngs=rngs) for layer in range(config.depth)]
        self.shared = nnx.List(
            SharedBlock(config, rngs=rngs)
            for _ in range(0 if config.shared is None else config.shared.blocks)
        )
        for layer in self.uses:
            blocks[layer].use = Use(config, self.shared[config.shared.block_of(layer)], rngs=rngs)
        share_tables(blocks)
        period = len(config.pattern)
        # What passes from one layer to another is not the same before and after each repeat.
        alike = config.route is None and config.stretch == 1 and deletion is None
        alike = alike and not any(
            block.mixer.takes_values or block.use is not None or shares_table(block) for block in blocks
        )
        if config.stretch > 1 and not any(block.mixer.takes_gaps for block in blocks):
            raise ValueError(
                f"stretch={config.stretch}, and no mixer of the pattern {config.pattern} takes positions with gaps; expected one that "
                "does, such as 'attention', or stretch=1"
            )
        if config.route is not None and any(block.mixer.takes_values for block in blocks):
            raise ValueError(
                "route is given, and layers read values of an earlier one; expected one of the two"
            )
        if config.residual == "reversible":
            if cross is not None or any(block.mixer.takes_values for block in blocks):
                raise ValueError(
                    "residual='reversible', and layers read more than the streams: a source, or values of an earlier layer; expected "
                    "residual='separate'"
                )
            reversible.check(blocks)
        if deletion is not None:
            _check_gates(blocks, deletion.layer)
            deletion = Deletion(deletion, width=config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.deletion = deletion
        repeats = config.depth // period if config.scan and alike else 0
        self.repeats = repeats if repeats > 1 else 0
        scanned = self.repeats * period
        # From the last one on, so that what layers share belongs to the first of them.
        for layer, block in reversed(list(enumerate(blocks))[scanned:]):
            for _, variable in nnx.to_flat_state(nnx.state(block)):
                variable.set_metadata(layers=(layer,))
        self.stacked = nnx.List(
            _stack(blocks[place:scanned:period], place, period) for place in range(period if scanned else 0)
        )
        self.blocks = nnx.List(blocks[scanned:])

    @property
    def uses(self) -> tuple[int, ...]:
        """The layers that use a shared block."""
        return () if self.config.shared is None else self.config.shared.layers

    @property
    def causal(self) -> bool:
        """Whether no mixer lets an output depend on later inputs."""
        return all(mixer.causal for _, mixer in self.mixers())

    def mixers(self) -> Iterator[tuple[int, Mixer]]:
        """Yields layers and their mixers, also shared ones; for stacked layers, the first of each place and the stacked mixer."""
        for place, block in enumerate(self.stacked):
            yield place, block.mixer
        for layer, block in enumerate(self.blocks, start=self.repeats * len(self.stacked)):
            yield layer, block.mixer
        for layer, block in zip(self.uses, self.shared, strict=False):
            yield layer, block.mixer

    def block(self, layer: int) -> Block:
        """Returns the block of a layer; if it is stacked, a copy with the variables of this layer."""
        if not 0 <= layer < self.config.depth:
            raise IndexError(
                f"layer={layer}; expected 0 to {self.config.depth - 1}, as depth={self.config.depth}"
            )
        period, scanned = len(self.stacked), self.repeats * len(self.stacked)
        if layer >= scanned:
            return self.blocks[layer - scanned]
        graph, variables = nnx.split(self.stacked[layer % period])
        return nnx.merge(graph, _at(variables, layer // period))

    @property
    def layers(self) -> list[Block]:
        """The blocks of all layers in order; those of stacked layers are copies."""
        return [self.block(layer) for layer in range(self.config.depth)]

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> tuple[Any, ...]:
        """Returns the initial state of each layer, and of each use of a shared block.

        `max_length` bounds the tokens that caches must hold.
        """
        mixers = [self.block(layer).mixer for layer in range(self.config.depth)]
        mixers += [self.shared[self.config.shared.block_of(layer)].mixer for layer in self.uses]
        return tuple(mixer.init_state(batch_size, max_length=max_length) for mixer in mixers)

    def sources(self, encoded: Encoded) -> tuple[Source, ...]:
        """Returns what each layer reads of a source, for calls with a state."""
        return tuple(self.block(layer).source(encoded) for layer in range(self.config.depth))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: tuple[Any, ...] | None = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
        source: Encoded | tuple[Source, ...] | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[Any, ...] | None]:
        """Returns the output of all layers and the states. A key means training.

        `source` is what layers with a cross-attention read: an encoder's output, or with a state what `sources` returns for it.
        """
        x, state, _ = self._run(x, state, Segments.of(segment_ids), key, source)
        return x, state

    def encode(
        self,
        x: Float[Array, "b t d"],
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b n d"], Segments | None]:
        """Returns the output of all layers on whole sequences, and its segments; with `deletion`, tokens may have left.

        In training none leaves, and the segments have their gates.
        """
        x, _, segments = self._run(x, None, Segments.of(segment_ids), key, None)
        return x, segments

    def _run(self, x, state, segments, key, source):
        """Returns the output of all layers, the states, and the segments of the output."""
        if self.reads_source != (source is not None):
            raise ValueError(
                "a stack with a cross-attention was called without a source; expected the output of an encoder"
                if self.reads_source
                else "a source was given to a stack without a cross-attention; expected None"
            )
        config, values = self.config, None
        if is_recording() and (self.repeats or config.route is not None or config.residual == "reversible"):
            raise ValueError(
                f"layers are recorded, and a stack has stacked={self.repeats > 0}, route={config.route} and "
                f"residual={config.residual!r}; expected scan=False, route=None and one stream"
            )
        keys = None if key is None else jax.random.split(key, config.depth)
        # Padding holds zeros from here on, whatever the embedding made of it.
        entered = x = divide_batch(select_real(x, segments))
        undone = config.residual == "reversible"
        if undone:
            x = reversible.doubled(x)
        if state is not None:
            self._check_state(state)
            # Runs layers one by one: a scan would copy the states of all layers.
            states, uses = [], []
            for layer in range(config.depth):
                layer_key, beside = None if keys is None else keys[layer], None
                if layer in self.uses:
                    beside, new = self._use(layer, x, entered, state[config.depth + len(uses)], segments)
                    uses.append(new)
                run = self.block(layer).sharing
                x, new, values = run(
                    x,
                    state[layer],
                    values,
                    segment_ids=segments,
                    key=layer_key,
                    beside=beside,
                    source=None if source is None else source[layer],
                )
                states.append(new)
                record(x)
            return reversible.merged(x, entered.dtype) if undone else x, (*states, *uses), segments
        if undone:
            x = reversible.run(x, self.stacked, self.blocks, segments, keys)
            return reversible.merged(x, entered.dtype), None, segments
        if self.repeats:
            x = self._scan(x, segments, keys, source)
        start, end = config.route if config.route is not None and keys is not None else (None, None)
        seen = (segments, segments)
        if config.stretch > 1 and keys is not None:
            # Not a key of dropout.
            drawn = jax.random.fold_in(key, config.depth)
            seen = segments, stretched(drawn, x.shape[:2], segments, config.stretch)
        given, whole, kept = seen, None, None
        for number, layer in enumerate(range(self.repeats * len(self.stacked), config.depth)):
            if layer == end:
                x, seen = returned(whole, x, kept), given
            if layer == start:
                # Not a key of dropout.
                drawn = jax.random.fold_in(keys[layer], config.depth)
                whole, kept = x, kept_tokens(drawn, x.shape[:2], segments, config.route_rate)
                x, seen = taken(x, kept), kept_segments(kept, x.shape[1], given[1])
            if self.deletion is not None and layer == self.deletion.config.layer:
                x, seen = self.deletion(x, seen[1], training=keys is not None)
            beside = self._use(layer, x, entered, None, segments)[0] if layer in self.uses else None
            gaps = self.blocks[number].mixer.takes_gaps
            x, values = self._one(x, values, seen[gaps], keys, number, layer, beside, source)
            record(x)
        return (returned(whole, x, kept) if end == config.depth else x), None, seen[0]

    def _check_state(self, state: Any) -> None:
        """Raises unless there is one state per layer and use of a shared block; each mixer checks its own."""
        count = self.config.depth + len(self.uses)
        if not isinstance(state, tuple | list) or hasattr(state, "_fields"):
            raise TypeError(
                f"state of a stack is a {type(state).__name__}; expected the tuple that its init_state returns"
            )
        if len(state) != count:
            uses = " and use of a shared block" if self.uses else ""
            raise ValueError(
                f"state of a stack has {len(state)} layers; expected {count}, one per layer{uses}"
            )

    def _use(self, layer, x, entered, state, segments):
        """Returns what the shared block of a layer gives to its mixer, and the state of the use."""
        block = self.shared[self.config.shared.block_of(layer)]
        graph, params = nnx.split((block, self.block(layer).use))
        run = _run_use if state is not None else self._rematerialised(_run_use)
        beside, state = run(x, entered, params, segments, state, graph)
        return divide_batch(beside), state

    def _one(self, x, values, segments, keys, number, layer, beside, source):
        """Runs one layer outside the scan."""
        graph, params, rest = nnx.split(self.blocks[number], nnx.Param, ...)
        run = self._rematerialised(_run_blocks)
        keys = None if keys is None else keys[layer : layer + 1]
        x, values, (rest,) = run(x, values, ((params, rest),), segments, keys, (graph,), beside, source)
        if keys is not None:
            nnx.update(self.blocks[number], rest)
        return x, values

    def _scan(self, x, segments, keys, source):
        """Runs all whole repeats of the pattern under one scan."""
        split = [nnx.split(block, nnx.Param, ...) for block in self.stacked]
        graphs = tuple(graph for graph, _, _ in split)
        if keys is not None:
            scanned = self.repeats * len(graphs)
            keys = keys[:scanned].reshape(self.repeats, len(graphs), *keys.shape[1:])
        variables = tuple((params, rest) for _, params, rest in split)
        if self.config.remat != "none":
            run = self._rematerialised(_run_blocks)
        elif _uses_complex(x, variables, segments, keys, graphs, source):
            run = _run_blocks  # jax.checkpoint cannot save complex arrays
        else:
            run = jax.checkpoint(_run_blocks, policy=_all_but_cheap, static_argnums=(5,), prevent_cse=False)

        def body(x, layers):
            variables, keys = layers
            x, _, rests = run(x, None, variables, segments, keys, graphs, None, source)
            return x, rests

        x, rests = jax.lax.scan(body, x, (variables, keys))
        # Only training changes statistics; writing them back otherwise makes inference impure.
        if keys is not None:
            for block, rest in zip(self.stacked, rests, strict=True):
                nnx.update(block, rest)
        return x

    def _rematerialised(self, run):
        """Returns `run` with the checkpoint policy of the config."""
        if self.config.remat == "none":
            return run
        return jax.checkpoint(run, policy=_POLICIES[self.config.remat], static_argnums=(5,))


def _check_gates(blocks: list[Block], first: int) -> None:
    """Raises unless the layers from `first` on add gates to the logits of their keys."""
    for layer, block in enumerate(blocks[first:], start=first):
        if not block.mixer.takes_gates:
            raise ValueError(
                f"deletion before layer {first}, and layer {layer} is {type(block.mixer).__name__}, which adds no gates to logits of "
                "keys; expected 'attention' from there on"
            )


def _stack(blocks: list[Block], place: int, period: int) -> Block:
    """Returns one block with the stacked variables of all; blocks of one place differ only in values of variables."""
    graph, *_ = nnx.split(blocks[0])
    states = [nnx.state(block) for block in blocks]
    stacked = nnx.merge(graph, jax.tree.map(lambda *values: jnp.stack(values), *states))
    layers = tuple(place + number * period for number in range(len(blocks)))
    for _, variable in nnx.to_flat_state(nnx.state(stacked)):
        variable.set_metadata(layers=layers)
        if isinstance(variable, nnx.Param):
            variable.set_metadata(
                axes=("layer", *axes_of(variable)[-(variable.ndim - 1) :][: variable.ndim - 1])
            )
    return stacked


def _at(variables: Any, number: int) -> Any:
    """Returns the variables of one repeat."""
    return jax.tree.map(lambda value: value[number], variables)


def _uses_complex(x, variables, segments, keys, graphs, source) -> bool:
    """Returns whether the blocks compute with complex numbers, from a trace of one repeat of the pattern."""

    def one(tree):
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), tree)

    traced = jax.make_jaxpr(
        lambda x, variables, keys: _run_blocks(x, None, variables, segments, keys, graphs, None, source)
    )(jax.ShapeDtypeStruct(x.shape, x.dtype), one(variables), one(keys))
    return _holds_complex(traced.jaxpr)


def _holds_complex(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if any(jnp.issubdtype(getattr(v.aval, "dtype", bool), jnp.complexfloating) for v in equation.outvars):
            return True
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns") and _holds_complex(inner):
                    return True
    return False


def _run_use(x, entered, params, segments, state, graph):
    """Runs a shared block and a use of it."""
    block, use = nnx.merge(graph, params)
    return use(block, x, entered, state, segment_ids=segments)


def _run_blocks(x, values, variables, segments, keys, graphs, beside=None, source=None):
    """Runs blocks given as pairs (params, rest); returns x, shared values and the rests, which norms may have updated."""
    rests = []
    for place, (graph, (params, rest)) in enumerate(zip(graphs, variables, strict=True)):
        block = nnx.merge(graph, params, rest)
        key = None if keys is None else keys[place]
        given = dict(segment_ids=segments, key=key, beside=beside, source=source)
        x, _, values = block.sharing(x, None, values, **given)
        x = divide_batch(x)
        rests.append(nnx.split(block, nnx.Param, ...)[2])
    return x, values, tuple(rests)
