"""Says what a config's model is made of and what it costs, layer by layer and against length, without making it.

    python -m experiments.describe --config=configs/lra/listops.py:mixer=s5
    python -m experiments.describe --config=configs/lra/listops.py:mixer=attention --lengths=1024,8192 --json
    python -m experiments.describe --config=configs/lra/listops.py:mixer=s5 --implementations --backend=gpu
    python -m experiments.describe --config=configs/lra/listops.py:mixer=s5 --scale --lengths=512

No data are read, and nothing is allocated but with --scale, which initializes the model and computes one batch. Operations are those of one row (of a pair for a dual encoder) without padding, in inference, as the
implementations for the devices that JAX finds compute it (`experiments.analysis.flops`); the state is what a causal model
carries for one row after that many tokens. Exit codes: 0 done; 2 the config or an argument cannot be used.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.analysis.flops import Flops, count_flops
from experiments.analysis.scale import Scale, scales
from experiments.config.command_line import (
    ArgumentError,
    Parser,
    positive_integer,
    positive_integers,
    reporting,
)
from experiments.config.models import sizes_without_data, with_sizes
from experiments.runs.files import to_json_text
from experiments.training import experiment
from layers.kernels import devices, dispatch
from seqmodels import DualEncoder, EncoderDecoder, HierarchicalMemory, PointerNetwork, RecurrentMemory
from seqmodels.block import Block
from seqmodels.encoder_decoder import of_pairs
from seqmodels.stack import Stack

PREFIXES = ("", "k", "M", "G", "T", "P")
LENGTHS = (1024, 4096, 16384, 65536)


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Describes the model and returns the exit code."""
    parser = Parser("experiments.describe", __doc__, config=True)
    parser.add_argument(
        "--lengths",
        type=positive_integers,
        default=LENGTHS,
        help="lengths of rows, in tokens, separated by commas",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--implementations",
        action="store_true",
        help="print what every layer's primitives take, at the first length",
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="print the scale of activations and gradients by layer at initialization, at the first length",
    )
    parser.add_argument(
        "--backend",
        choices=["cpu", "gpu", "tpu"],
        help="device for --implementations (default: the one here)",
    )
    parser.add_argument(
        "--batch", type=positive_integer, default=8, help="rows for --implementations and --scale"
    )
    values = parser.parse_args(argv)
    if values.backend and not values.implementations:
        raise ArgumentError(f"--backend={values.backend} has no effect without --implementations")
    if values.scale and values.implementations:
        raise ArgumentError("--scale and --implementations print different tables; choose one")
    if values.scale:
        rows = scale(values.config, values.lengths[0], values.batch)
        print(to_json_text([row._asdict() for row in rows]) if values.json else scale_text(rows))
        return 0
    if values.implementations:
        backend = values.backend or jax.default_backend()
        rows = implementations(values.config, values.lengths[0], values.batch, backend)
        print(to_json_text(rows) if values.json else implementations_text(rows, backend))
        return 0
    record = describe(values.config, values.lengths)
    print(to_json_text(record) if values.json else table(record), end="" if values.json else "\n")
    return 0


def implementations(config: Mapping[str, Any], length: int, batch: int, backend: str) -> list[dict[str, Any]]:
    """Returns the calls of primitives per layer: the implementation on one device, and why no faster one applies.

    Args:
      config: plain config, see `loading.to_plain`.
      length, batch: number of tokens and of rows of the inputs.
      backend: "cpu", "gpu" (Hopper) or "tpu"; it need not be present.
    """
    rows = []
    for number, (stack, layer) in enumerate(_places(experiment.model_without_data(config))):
        x = jax.ShapeDtypeStruct((batch, length, stack.config.width), jnp.dtype(stack.config.dtype))
        graph, variables = nnx.split(stack.blocks[layer])
        with devices.as_on(backend), dispatch.explained() as choices:
            jax.eval_shape(
                lambda variables, x, graph=graph: nnx.merge(graph, variables).alone(x), variables, x
            )
        calls = [
            choice._asdict() | {"passed_over": [list(one) for one in choice.passed_over]}
            for choice in choices
        ]
        rows.append(dict(layer=number, mixer=_mixer(stack.config, layer), calls=calls))
    return rows


def implementations_text(rows: Sequence[Mapping[str, Any]], backend: str) -> str:
    """Returns `implementations` as a readable table."""
    lines = [f"Implementations on one {backend}, forward:"]
    for row in rows:
        lines.append(f"layer {row['layer']}, {row['mixer']}")
        for call in row["calls"]:
            lines.append(f"  {call['primitive']}: {call['implementation']} ({call['arguments']})")
            lines.extend(f"    not {name}: {reason}" for name, reason in call["passed_over"])
    return "\n".join(lines)


def scale(config: Mapping[str, Any], length: int, batch: int) -> list[Scale]:
    """Returns the scale of activations and gradients by layer at initialization, see `analysis.scale.scales`.

    Raises:
      ValueError: the config is invalid.
    """
    experiment.model_without_data(config)
    values = with_sizes(config, sizes_without_data(config))
    return scales(values, batch=batch, length=length, seed=config["seed"])


def scale_text(rows: Sequence[Scale]) -> str:
    """Returns `scale` as a readable table."""
    cells = [("place", "activation", "gradient")]
    cells += [(row.place, f"{row.activation:.3e}", f"{row.gradient:.3e}") for row in rows]
    return f"Root mean squares at initialization; gradients of the summed loss:\n\n{_columns(cells, left=1)}"


def describe(config: Mapping[str, Any], lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Returns the content of the table, as JSON.

    Args:
      config: plain config, see `loading.to_plain`.
      lengths: numbers of tokens per row; operations of single layers are given for the first.

    Raises:
      ValueError: the config or a length is invalid.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={list(lengths)}; expected one or more, of at least 1 token")
    model = experiment.model_without_data(config)
    stacks, total = _stacks(model), _parameters(model)
    stack = stacks[-1]
    layers = [
        dict(
            layer=number,
            mixer=_mixer(one.config, i),
            channel=_channel(one.config, i),
            **_layer(one, i, lengths[0]),
        )
        for number, (one, i) in enumerate(_places(model))
    ]
    rest = total - sum(map(_parameters, stacks))
    shared = sum(_parameters(one.shared) for one in stacks)
    return dict(
        kind=config["model"]["kind"],
        width=stack.config.width,
        dtype=str(jnp.dtype(stack.config.dtype)),
        causal=stack.causal,
        backend=jax.default_backend(),
        layers=layers,
        **({"shared_blocks": dict(parameters=shared)} if shared else {}),
        embedding_and_head=dict(parameters=rest),
        parameters=total,
        parameter_bytes=4 * total,
        lengths=[_at_length(model, length) for length in lengths],
    )


def _stacks(model: nnx.Module) -> tuple[Stack, ...]:
    """Returns the stacks of a model, that which gives its outputs last."""
    if isinstance(model, EncoderDecoder):
        return model.encoder, model.decoder.stack
    if isinstance(model, PointerNetwork) and model.encoder is not None:
        return model.encoder, model.stack
    before = getattr(model, "characters", None)
    return (model.stack,) if before is None else (before, model.stack)


def _places(model: nnx.Module) -> list[tuple[Stack, int]]:
    """Returns the stack of each layer and its number there."""
    return [(stack, layer) for stack in _stacks(model) for layer in range(stack.config.depth)]


def _parameters(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _mixer(config: Any, layer: int) -> str:
    """Returns the name in the pattern, and the mixer that it stands for if it is an alias."""
    name, (registered, options) = (
        config.pattern[layer % len(config.pattern)].partition("+")[0],
        config.mixer_of(layer),
    )
    shown = registered if "inner" not in options else f"{registered} {options['inner']}"
    return shown if name == registered else f"{name} ({shown})"


def _channel(config: Any, layer: int) -> str | None:
    chosen = config.channel_of(layer)
    return None if chosen is None else chosen[0]


def _layer(stack: Any, layer: int, length: int) -> dict[str, Any]:
    """Returns parameters and operations per token of one layer, its norms and residual connections included.

    Shared blocks are counted apart: their parameters once, their operations in those of the whole model.
    """
    block, config = stack.blocks[layer], stack.config
    x = jax.ShapeDtypeStruct((1, length, config.width), jnp.dtype(config.dtype))
    flops = _flops(block, x)
    return dict(
        parameters=_parameters(block),
        flops_per_token=None if isinstance(flops, str) else flops.total / length,
    )


def _flops(module: nnx.Module, inputs: jax.ShapeDtypeStruct) -> Flops | str:
    """Returns the operations of one call, or the reason why the module refuses it."""
    graph, variables = nnx.split(module)

    def run(variables: nnx.State, x: jax.Array) -> jax.Array:
        merged = nnx.merge(graph, variables)
        if isinstance(merged, EncoderDecoder | PointerNetwork):
            return of_pairs(merged, x, segment_ids=None)
        return merged.alone(x) if isinstance(merged, Block) else merged(x)[0]

    try:
        return count_flops(run, variables, inputs)
    except ValueError as error:
        return str(error)


def _at_length(model: nnx.Module, length: int) -> dict[str, Any]:
    """Returns the operations of one row, or pair of rows, of this length, and the bytes of the state carried after it.

    The state of an encoder-decoder holds what its layers read of the source too.
    """
    size, shape = (
        model.config.input.input_size,
        (1, 2, length) if isinstance(model, DualEncoder | EncoderDecoder | PointerNetwork) else (1, length),
    )
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    inputs = tokens if size is None else jax.ShapeDtypeStruct((*shape, size), jnp.float32)
    flops = _flops(model, inputs)
    if isinstance(flops, str):
        return dict(length=length, refused=flops)
    state = None
    stack = _stacks(model)[-1]
    if stack.causal:
        graph, variables = nnx.split(model)  # a trained initial state is a parameter

        def carried(variables: nnx.State) -> Any:
            merged = nnx.merge(graph, variables)
            if isinstance(merged, EncoderDecoder):
                state = merged.init_state(jnp.zeros((1, length), jnp.int32), max_length=length)
                return state.layers, state.sources
            if isinstance(merged, HierarchicalMemory):
                state = merged.init_state(1)
                return state.memories, state.tokens
            if isinstance(merged, RecurrentMemory):
                return merged.init_state(1).memory
            return merged.stack.init_state(1, max_length=length)

        shapes = jax.eval_shape(carried, variables)
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return dict(
        length=length,
        flops_per_token=flops.total / math.prod(shape),
        flops=flops.total,
        in_matrix_products=flops.matrix / flops.total,
        exact=flops.exact,
        state_bytes=state,
    )


def table(record: Mapping[str, Any]) -> str:
    """Returns the readable tables."""
    first = record["lengths"][0]["length"]
    layers = [("layer", "mixer", "channel", "parameters", f"FLOPs a token at {first:,}")]
    layers += [
        (
            str(row["layer"]),
            row["mixer"],
            row["channel"] or "-",
            f"{row['parameters']:,}",
            _si(row["flops_per_token"]),
        )
        for row in record["layers"]
    ]
    if "shared_blocks" in record:
        layers.append(("", "shared blocks", "", f"{record['shared_blocks']['parameters']:,}", ""))
    layers.append(("", "embedding, head", "", f"{record['embedding_and_head']['parameters']:,}", ""))
    layers.append(
        ("", "all", "", f"{record['parameters']:,}", _si(record["lengths"][0].get("flops_per_token")))
    )
    costs = [("length", "FLOPs a token", "FLOPs a row", "in matrix products", "state of a row")]
    for row in record["lengths"]:
        if "refused" in row:
            costs.append((f"{row['length']:,}", "-", "-", "-", row["refused"]))
            continue
        least = "" if row["exact"] else ">= "
        state = "none (not causal)" if row["state_bytes"] is None else f"{_si(row['state_bytes'])}B"
        costs.append(
            (
                f"{row['length']:,}",
                least + _si(row["flops_per_token"]),
                least + _si(row["flops"]),
                f"{row['in_matrix_products']:.0%}",
                state,
            )
        )
    heading = (
        f"{record['kind'].replace('_', ' ')} of width {record['width']}, {len(record['layers'])} layers, "
        f"{record['parameters']:,} parameters ({_si(record['parameter_bytes'])}B), activations {record['dtype']}"
    )
    note = f"Forward, one row, as computed on {record['backend']}."
    return "\n".join([heading, "", _columns(layers, left=3), "", _columns(costs, left=0), "", note])


def _columns(rows: Sequence[Sequence[str]], left: int) -> str:
    """Returns rows as aligned columns, the first `left` of them left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _si(value: float | None) -> str:
    """Returns three digits and a decimal prefix: 1.23 M."""
    if value is None:
        return "-"
    power = min(max(0, math.floor(math.log10(max(value * 1.0005, 1)) / 3)), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}"


if __name__ == "__main__":
    sys.exit(main())
