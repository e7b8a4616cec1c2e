"""Rows of the study `scaling` that are whole mixers: those of the attention family beside softmax attention, at one width."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmark import processes
from experiments.benchmark.alone import lacks_memory
from experiments.benchmark.timing import interleaved, peak_bytes
from layers.adapters import dropping
from layers.mixers import make_mixer
from layers.parameters import AuxiliaryLoss

PREFIX = "mixer"
WIDTH, HEADS = 64, 4
REFERENCE = "attention"
LENGTH = "the length of the row"
# By name, the mixer and its options; windows, blocks, groups and latents are of one order, and other options the defaults.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("attention", {}),
    "window of 256": ("attention", {"window": 256}),
    "power_attention": ("power_attention", {"block": 64}),
    "strided_attention": ("strided_attention", {"block": 64}),
    "core_context": ("core_context", {}),
    "moba": ("moba", {"block": 128, "top_k": 3}),
    "nsa": ("nsa", {}),
    "shifted_sparse": ("shifted_sparse", {"group": 256}),
    "shortformer": ("shortformer", {"subsequence": 256}),
    "mega": ("mega", {"chunk": 256, "max_length": None}),
    "longformer": ("longformer", {"window": 256}),
    "bigbird": ("bigbird", {"block": 64}),
    "etc": ("etc", {}),
    "longt5": ("longt5", {}),
    "reformer": ("reformer", {}),
    "nystromformer": ("nystromformer", {}),
    "luna": ("luna", {}),
    "linformer": ("linformer", {"max_length": LENGTH}),
}


def chosen(only: Sequence[str]) -> list[str]:
    """Returns the cases that names such as "mixer" (all of them) and "mixer/luna" mean.

    Raises:
      ValueError: a name is of no case.
    """
    names = [name.partition("/")[2] for name in only]
    if unknown := [name for name in names if name and name not in CASES]:
        raise ValueError(f"only='{PREFIX}/{unknown[0]}' is no benchmark; choose from {', '.join(CASES)}")
    return [name for name in CASES if "" in names or name in names]


def prepare(dtype: str, rounds: int, name: str, length: int, say: processes.Say) -> processes.Ready:
    """Compiles both passes of a mixer on one row: gradients of its parameters and of the row."""
    mixer, given = CASES[name]
    options = {option: length if value is LENGTH else value for option, value in given.items()}
    given = {"width": WIDTH, "dtype": jnp.dtype(dtype), "heads": HEADS}
    graph, params, rest = nnx.split(make_mixer(mixer, options, given=given, rngs=nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (1, length, WIDTH), dtype)

    def loss(params, x):
        model = nnx.merge(graph, params, rest, copy=True)
        with dropping(jax.random.key(1)):
            y, _ = model(x)
        own = sum(jax.tree.leaves(nnx.state(model, AuxiliaryLoss)), jnp.zeros(()))
        return jnp.sum(y.astype(jnp.float32) ** 2) + own

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
    row = dict(
        primitive=PREFIX,
        case=name,
        time=length,
        dtype=dtype,
        shapes=dict(x=[1, length, WIDTH]),
        both_peak_bytes=peak_bytes(compiled),
    )
    say(f"{PREFIX}/{name}, {length} tokens: ready")

    def measure() -> list[dict[str, Any]]:
        try:
            timing = interleaved({"both": functools.partial(compiled, params, x)}, rounds)["both"]
        except jax.errors.JaxRuntimeError as error:
            if not lacks_memory(error):
                raise
            say(f"{PREFIX}/{name}, {length} tokens: the device has too little memory")
            return []
        return [row | {"both_ms": timing.median, "both_quartiles_ms": [timing.low, timing.high]}]

    return processes.Ready(measure, row["both_peak_bytes"])


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns milliseconds per mixer and length, with the part of the time of softmax attention in brackets where that was measured."""
    rows = [row for row in rows if row["primitive"] == PREFIX]
    lengths = sorted({row["time"] for row in rows})
    found = {(row["case"], row["time"]): row["both_ms"] for row in rows}
    lines = ["| mixer | " + " | ".join(f"{length:,} tokens" for length in lengths) + " | grows as t to the |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = []
        for length in lengths:
            own, softmax = found.get((case, length)), found.get((REFERENCE, length))
            text = "" if own is None else f"{own:.1f}"
            cells.append(f"{text} ({own / softmax:.2f})" if own is not None and softmax else text)
        own = [(length, found[case, length]) for length in lengths if (case, length) in found]
        power = np.polyfit(*np.log(np.array(own[-2:], float)).T, 1)[0] if len(own) > 1 else np.nan
        lines.append(f"| {case} | " + " | ".join(cells) + f" | {power:.2f} |")
    return "\n".join(lines) + "\n"
