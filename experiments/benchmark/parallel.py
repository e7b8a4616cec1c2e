"""The study `parallel`: what dividing time over devices sends, how long it takes here, and what that makes of many devices.

For each primitive and method the program of a training step, forward and backward, is compiled for the devices that there are.
Its collectives are counted (`collectives`) beside the formula of the method, and it is timed. Devices of one host that a CPU
emulates have no links, so that their times compare nothing but the arithmetic.

The model extends the formulas to more devices, with `time` tokens in all:

    arithmetic = FLOPs of the busiest device / rate
    transfer   = messages x latency + bytes / bandwidth
    seconds    = max(arithmetic, transfer) if the method overlaps them, or else their sum
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.benchmark.collectives import bytes_sent
from experiments.benchmark.report import COLOURS
from experiments.benchmark.timing import interleaved, peak_bytes
from layers.kernels.attention import attention
from layers.kernels.delta_rule import delta_rule
from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.long_conv import long_conv
from layers.kernels.sequence_parallel import attention_by, states_by
from layers.kernels.short_conv import short_conv
from layers.sharding import MESH_AXES

TAPS = 4  # of the short convolution
SUM = 4  # bytes of a number in a sum or a state
MOST_DEVICES, MODEL_TIME = 1024, 2**20  # of the model
CHUNK = 64  # tokens over which a chunked recurrence multiplies with each other


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a layer: rows, tokens in all, heads of queries and of keys, features of a head, bytes of a number."""

    batch: int
    time: int
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def width(self) -> int:
        """Channels of a recurrence or a convolution."""
        return self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Links:
    """Assumptions of the model.

    Attributes:
      latency: seconds per message.
      bandwidth: bytes per second that a device sends.
      flops: FLOPs per second that it computes.
      source: where these numbers come from.
    """

    latency: float = 1e-5
    bandwidth: float = 5e10
    flops: float = 4e14
    source: str = "assumed"

    def describe(self) -> str:
        """The assumptions in words."""
        return (
            f"{self.source}: {self.latency * 1e6:g} us per message, {self.bandwidth / 1e9:g} GB/s per device and direction, "
            f"{self.flops / 1e12:g} TFLOP/s"
        )


def read_links(path: Path) -> Links:
    """Returns the links that the study `long_rows` measured, from its long_rows.json.

    Raises:
      ValueError: the file has no measured links.
    """
    rows = json.loads(path.read_text()).get("rows", [])
    measured = next((row for row in rows if "links" in row), None)
    if measured is None:
        raise ValueError(
            f"links={path} has no measured links; expected what `experiments.benchmark long_rows --only=links` writes"
        )
    return Links(**measured["links"], source=f"measured on {measured['device']}")


class Cost(NamedTuple):
    """What one pass takes of a device: bytes that it sends, messages one after the other, FLOPs of the busiest."""

    bytes: float
    messages: float
    flops: float


class Method(NamedTuple):
    """A primitive by one method.

    Attributes:
      primitive, name: of both.
      draw: gives the arrays of a call, by name.
      call: the call on these arrays.
      cost: the published formula, forward and both passes, for sizes and a number of devices.
      overlaps: whether what it sends is independent of what it computes meanwhile.
      attention, states: the methods in force.
    """

    primitive: str
    name: str
    draw: Callable[[Sizes], dict[str, tuple[int, ...]]]
    call: Callable[..., jax.Array]
    cost: Callable[[Sizes, int], tuple[Cost, Cost]]
    overlaps: bool
    attention: str = "all_gather"
    states: str = "all_gather"


def _heads(s: Sizes) -> dict[str, tuple[int, ...]]:
    keys = (s.batch, s.time, s.kv_heads, s.head_dim)
    return {"q": (s.batch, s.time, s.heads, s.head_dim), "k": keys, "v": keys}


def _linear_heads(s: Sizes) -> dict[str, tuple[int, ...]]:
    heads = (s.batch, s.time, s.heads, s.head_dim)
    return dict.fromkeys("qkv", heads) | {"log_decay": heads[:3]}


def _attention_cost(method: str, s: Sizes, parts: int) -> tuple[Cost, Cost]:
    """Backward costs 2.5 times the FLOPs, five products of logits for two; a ring of scores computes what is hidden too."""
    tokens = s.batch * s.time / parts
    queries, keys = tokens * s.heads * s.head_dim, 2 * tokens * s.kv_heads * s.head_dim
    hops = parts - 1
    half = 2 * s.batch * s.heads * s.head_dim * s.time**2 / parts  # causal: half of both products
    # In contiguous order the queries of the last device see all keys but half of its own.
    flops = half * (2 - 1 / parts if method in ("all_gather", "ring", "score_ring") else 1)
    first = 2 * half if method == "score_ring" else flops
    # Zig-zag order exchanges queries, keys, values and outputs, and back their gradients.
    order = (queries + keys) * s.item + queries * SUM, queries * s.item + keys * s.item + queries * SUM
    if method == "all_gather":
        forward, backward = hops * keys * s.item, hops * keys * s.item
        messages = hops, hops
    elif method == "ulysses":
        repeats = math.lcm(s.kv_heads, parts) / s.kv_heads
        forward = backward = hops / parts * (2 * queries + repeats * keys) * s.item
        messages = 4 * hops, 4 * hops
    elif method in ("ring", "zigzag", "score_ring"):
        forward, backward = hops * keys * s.item, hops * keys * s.item + parts * keys * SUM
        messages = hops * (1 + (method == "score_ring")), parts
    else:
        rows = tokens * s.heads * SUM
        forward = hops * (queries * s.item + queries * SUM + 2 * rows)
        backward = hops * (2 * queries * s.item + 3 * rows + queries * SUM)
        messages = hops, hops
    if method in ("zigzag", "token_ring"):
        forward, backward = forward + order[0], backward + order[1]
        messages = messages[0] + 4, messages[1] + 4
    both = Cost(forward + backward, messages[0] + messages[1], first + 2.5 * flops)
    return Cost(forward, messages[0], first), both


def _state_cost(
    transition: int, states: str, flops: Callable[[Sizes], float], s: Sizes, parts: int
) -> tuple[Cost, Cost]:
    """A state (k, v) and a transition of as many numbers as `transition` per head; tokens are read twice."""
    state = s.batch * s.heads * s.head_dim * s.head_dim * SUM
    if states == "all_gather":
        sent = (parts - 1) * (state + s.batch * s.heads * transition * SUM)
        messages = parts - 1
    else:
        blocks = _blocks(s.head_dim, parts)
        messages = blocks + parts - 2
        sent = messages / blocks * state
    work = 2 * flops(s) * s.batch * s.time / parts
    return Cost(sent, messages, work), Cost(2 * sent, 2 * messages, 3 * work)


def _blocks(size: int, parts: int) -> int:
    """The blocks that `layers.kernels.all_scan` cuts a state into."""
    return max(n for n in range(1, min(parts, size) + 1) if size % n == 0)


def _linear_flops(s: Sizes) -> float:
    return s.heads * (4 * s.head_dim**2 + 4 * CHUNK * s.head_dim)


def _delta_flops(s: Sizes) -> float:
    return s.heads * (6 * s.head_dim**2 + 8 * CHUNK * s.head_dim)


def _recurrence_cost(s: Sizes, parts: int) -> tuple[Cost, Cost]:
    sent, work = (parts - 1) * 2 * s.batch * s.width * SUM, 4 * s.batch * s.time * s.width / parts
    return Cost(sent, parts - 1, work), Cost(2 * sent, 2 * (parts - 1), 3 * work)


def _halo_cost(s: Sizes, parts: int) -> tuple[Cost, Cost]:
    sent = s.batch * (TAPS - 1) * s.width * SUM
    work = 2 * TAPS * s.batch * s.time * s.width / parts
    return Cost(sent, 1, work), Cost(2 * sent, 2, 3 * work)


def _exchange_cost(s: Sizes, parts: int) -> tuple[Cost, Cost]:
    sent = 2 * (parts - 1) / parts * s.batch * s.time / parts * s.width * s.item
    work = (
        30 * s.batch * s.time * s.width * math.log2(2 * s.time) / parts
    )  # three transforms of twice the length
    return Cost(sent, 2 * (parts - 1), work), Cost(2 * sent, 4 * (parts - 1), 3 * work)


def _methods() -> Iterator[Method]:
    causal = functools.partial(attention, causal=True)
    for name in ("all_gather", "ulysses", "ring", "zigzag", "token_ring", "score_ring"):
        cost = functools.partial(_attention_cost, name)
        overlaps = name not in ("all_gather", "ulysses")
        yield Method("attention", name, _heads, causal, cost, overlaps, attention=name)
    for states in ("all_gather", "all_scan"):
        for primitive, call, draw, transition, flops in (
            ("gated_linear_attention", _linear, _linear_heads, 1, _linear_flops),
            (
                "delta_rule",
                _delta,
                lambda s: _linear_heads(s) | {"beta": (s.batch, s.time, s.heads)},
                None,
                _delta_flops,
            ),
        ):
            cost = functools.partial(_dense_or, transition, states, flops)
            yield Method(primitive, states, draw, call, cost, False, states=states)

    def channels(s):
        return (s.batch, s.time, s.width)

    yield Method(
        "linear_recurrence",
        "all_gather",
        lambda s: {"log_a": channels(s), "x": channels(s)},
        lambda log_a, x: linear_recurrence(jnp.exp(-jnp.abs(log_a)), x)[0],
        _recurrence_cost,
        False,
    )
    yield Method(
        "short_conv",
        "halo",
        lambda s: {"x": channels(s), "weight": (TAPS, s.width)},
        lambda x, weight: short_conv(x, weight)[0],
        _halo_cost,
        False,
    )
    yield Method(
        "long_conv",
        "exchange",
        lambda s: {"x": channels(s), "kernel": (s.width, s.time)},
        lambda x, kernel: long_conv(x, kernel)[0],
        _exchange_cost,
        False,
    )


def _dense_or(transition, states, flops, s, parts):
    return _state_cost(transition or s.head_dim**2, states, flops, s, parts)


def _linear(q, k, v, log_decay):
    return gated_linear_attention(q, k, v, log_decay=-jnp.abs(log_decay))[0]


def _delta(q, k, v, log_decay, beta):
    options = {"log_decay": -jnp.abs(log_decay), "normalize_qk": True}
    return delta_rule(q, k, v, jax.nn.sigmoid(beta), **options)[0]


METHODS = tuple(_methods())


def chosen(only: Sequence[str]) -> list[Method]:
    """Returns the methods with these names, `primitive` or `primitive/method`; all if there are none.

    Raises:
      ValueError: an unknown name.
    """
    names = {f"{m.primitive}/{m.name}": m for m in METHODS}
    for name in only:
        if name not in names and name not in {m.primitive for m in METHODS}:
            raise ValueError(
                f"only={name!r} is no method; expected primitives or methods among {', '.join(names)}"
            )
    return [m for name, m in names.items() if not only or name in only or m.primitive in only]


def compiled_passes(
    method: Method, sizes: Sizes, devices: Sequence[jax.Device]
) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Returns the compiled forward pass and both passes on a mesh that divides time over the devices, each with a call."""
    shape = [len(devices) if name == "sequence" else 1 for name in MESH_AXES]
    mesh = jax.make_mesh(tuple(shape), MESH_AXES, (AxisType.Auto,) * len(shape), devices=devices)
    rng = np.random.default_rng(0)

    def place(shape):
        cut = P(None, "sequence") if shape[:2] == (sizes.batch, sizes.time) else P()
        array = jnp.asarray(rng.standard_normal(shape, np.float32), sizes.dtype)
        return jax.device_put(array, NamedSharding(mesh, cut))

    arrays = {name: place(shape) for name, shape in method.draw(sizes).items()}

    cut = NamedSharding(mesh, P(None, "sequence"))
    # Gradients of parameters are summed whatever the method is.
    tokens = {name: x for name, x in arrays.items() if x.sharding == cut}

    def loss(tokens, arrays):
        return jnp.square(method.call(**arrays | tokens).astype(jnp.float32)).sum()

    with jax.set_mesh(mesh), attention_by(method.attention), states_by(method.states):
        forward = jax.jit(lambda arrays: method.call(**arrays), out_shardings=cut).lower(arrays).compile()
        both = jax.jit(jax.grad(loss), out_shardings=cut).lower(tokens, arrays).compile()
    return {
        "forward": (forward, functools.partial(forward, arrays)),
        "both": (both, functools.partial(both, tokens, arrays)),
    }


def run(
    only: Sequence[str],
    sizes: Sizes,
    devices: Sequence[jax.Device],
    rounds: int,
    report: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Returns bytes, formula, time and memory of each method on these devices; `report` receives each row.

    Raises:
      ValueError: an unknown name, or fewer than two devices, or sizes that they do not divide.
    """
    parts = len(devices)
    if parts < 2:
        raise ValueError(
            "parallel compares methods over several devices, and JAX sees one; on a CPU set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
    for name, size, divisor in (("time", sizes.time, 2 * parts), ("heads", sizes.heads, parts)):
        if size % divisor:
            raise ValueError(
                f"{name}={size} cannot be divided over {parts} devices; use a multiple of {divisor}"
            )
    rows = []
    for method in chosen(only):
        passes = compiled_passes(method, sizes, devices)
        times = interleaved({name: call for name, (_, call) in passes.items()}, rounds)
        row: dict[str, Any] = {"primitive": method.primitive, "method": method.name, "devices": parts}
        row |= dataclasses.asdict(sizes)
        for (name, (one, _)), cost in zip(passes.items(), method.cost(sizes, parts), strict=True):
            sent = bytes_sent(one.as_text())
            row |= {
                f"{name}_bytes": sent.total(),
                f"{name}_bytes_by_kind": dict(sent),
                f"{name}_formula_bytes": cost.bytes,
                f"{name}_ms": times[name].median,
                f"{name}_peak_bytes": peak_bytes(one),
            }
        rows.append(row)
        report(row)
    return rows


HEADER = f"{'':36}  {'forward MB':>10}  {'formula':>10}  {'both MB':>10}  {'formula':>10}  {'both ms':>9}  {'peak MB':>9}"


def line(row: Mapping[str, Any]) -> str:
    """Returns one row as text: megabytes that a device sends, counted and by the formula, milliseconds and memory."""
    numbers = [row[f"{p}_{what}"] / 1e6 for p in ("forward", "both") for what in ("bytes", "formula_bytes")]
    label = f"{row['primitive']}, {row['method']}"
    shown = "  ".join(f"{number:10.4f}" for number in numbers)
    return f"{label:36}  {shown}  {row['both_ms']:9.2f}  {row['both_peak_bytes'] / 1e6:9.2f}"


def extrapolated(only: Sequence[str], sizes: Sizes, links: Links) -> list[dict[str, Any]]:
    """Returns what the model says of each method on 1 to `MOST_DEVICES` devices, with as many tokens in all.

    Ulysses stops where devices outnumber heads of queries.
    """
    rows = []
    for method in chosen(only):
        for parts in (2**n for n in range(MOST_DEVICES.bit_length())):
            if method.name == "ulysses" and sizes.heads % parts:
                continue
            _, cost = method.cost(sizes, parts)
            arithmetic = cost.flops / links.flops
            transfer = (cost.messages * links.latency + cost.bytes / links.bandwidth) if parts > 1 else 0.0
            seconds = max(arithmetic, transfer) if method.overlaps else arithmetic + transfer
            rows.append(
                dict(
                    primitive=method.primitive,
                    method=method.name,
                    devices=parts,
                    arithmetic_ms=1e3 * arithmetic,
                    transfer_ms=1e3 * transfer,
                    ms=1e3 * seconds,
                )
            )
    return rows


def model_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the model as a table: milliseconds by method and number of devices."""
    counts = sorted({row["devices"] for row in rows})
    lines = [f"{'devices':36}" + "".join(f"{count:>10}" for count in counts)]
    for name in dict.fromkeys((row["primitive"], row["method"]) for row in rows):
        found = {row["devices"]: row["ms"] for row in rows if (row["primitive"], row["method"]) == name}
        cells = (f"{found[count]:10.3f}" if count in found else f"{'':10}" for count in counts)
        lines.append(f"{', '.join(name):36}" + "".join(cells))
    return lines


def draw(rows: Sequence[Mapping[str, Any]], path: Path, sizes: Sizes, links: Links) -> None:
    """Draws the model: milliseconds of both passes of a layer against the number of devices, with its assumptions."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLOURS)
    names = dict.fromkeys((row["primitive"], row["method"]) for row in rows)
    for number, name in enumerate(names):
        points = [(row["devices"], row["ms"]) for row in rows if (row["primitive"], row["method"]) == name]
        axes.plot(*zip(*points), marker="os^vDPX*"[number % 8], markersize=4, label=", ".join(name))
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="milliseconds of a layer, both passes")
    axes.set_title(f"{sizes.batch} x {sizes.time} tokens, a model; {links.describe()}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)
