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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.benchmark import alone
from experiments.benchmark.collectives import bytes_sent
from experiments.benchmark.parallel_methods import Method, Sizes, chosen
from experiments.benchmark.report import COLOURS
from experiments.benchmark.timing import interleaved, peak_bytes
from layers.kernels.sequence_parallel import attention_by, states_by
from layers.sharding import MESH_AXES

MOST_DEVICES, MODEL_TIME = 1024, 2**20  # of the model


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

    A method for which the devices have too little memory has a row with `out_of_memory`, the reason.

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
        row: dict[str, Any] = {"primitive": method.primitive, "method": method.name, "devices": parts}
        row |= dataclasses.asdict(sizes)
        try:
            row |= _measured(method, sizes, devices, rounds)
        except jax.errors.JaxRuntimeError as error:
            if not alone.lacks_memory(error):
                raise
            row["out_of_memory"] = alone.reason(error)
        rows.append(row)
        report(row)
    return rows


def _measured(method, sizes, devices, rounds) -> dict[str, Any]:
    """Bytes, formula, time and memory of both passes of a method."""
    passes = compiled_passes(method, sizes, devices)
    times = interleaved({name: call for name, (_, call) in passes.items()}, rounds)
    found: dict[str, Any] = {}
    for (name, (one, _)), cost in zip(passes.items(), method.cost(sizes, len(devices)), strict=True):
        sent = bytes_sent(one.as_text())
        found |= {
            f"{name}_bytes": sent.total(),
            f"{name}_bytes_by_kind": dict(sent),
            f"{name}_formula_bytes": cost.bytes,
            f"{name}_ms": times[name].median,
            f"{name}_peak_bytes": peak_bytes(one),
        }
    return found


HEADER = f"{'':36}  {'forward MB':>10}  {'formula':>10}  {'both MB':>10}  {'formula':>10}  {'both ms':>9}  {'peak MB':>9}"


def line(row: Mapping[str, Any]) -> str:
    """Returns one row as text: megabytes that a device sends, counted and by the formula, milliseconds and memory."""
    if "out_of_memory" in row:
        return f"{row['primitive']}, {row['method']}: out of memory"
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
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLOURS)
    names = dict.fromkeys((row["primitive"], row["method"]) for row in rows)
    for number, name in enumerate(names):
        points = [(row["devices"], row["ms"]) for row in rows if (row["primitive"], row["method"]) == name]
        axes.plot(*zip(*points), marker="os^vDPX*"[number % 8], markersize=4, label=", ".join(name))
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="milliseconds of a layer, both passes")
    axes.set_title(
        f"A model: {sizes.batch} x {sizes.time} tokens, {sizes.heads} heads of {sizes.head_dim}, {sizes.kv_heads} of keys, "
        f"{sizes.dtype}\n{links.describe()}; rings send while they compute",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right center")
    FigureCanvasAgg(figure).print_png(path)
