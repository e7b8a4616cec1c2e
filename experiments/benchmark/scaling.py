"""The study `scaling`: time and memory of the primitives whose cost should be proportional to the length."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.benchmark import calls
from experiments.benchmark.kernels import Options, selected
from experiments.benchmark.timing import interleaved, peak_bytes

# One or two cases of a primitive; those with a kernel of fixed length or a quadratic cost say nothing here.
CASES = (
    "linear_recurrence/real",
    "selective_scan/Mamba",
    "gated_linear_attention/scalar decay",
    "gated_linear_attention/channel decay",
    "delta_rule/gated delta rule",
    "delta_rule/KDA",
    "dplr_delta_rule/RWKV-7",
    "short_conv/4 taps, SiLU",
    "long_conv/as long as the input",
    "ssm_kernel/diagonal (S4D)",
    "attention/window of 512",
)


def run(options: Options, lengths: Sequence[int], report: Callable[[dict], None]) -> list[dict]:
    """Times both passes at every length, one row of a batch; `report` gets each row as soon as it is known.

    Raises:
      ValueError: unknown names in `options.only`.
    """
    rows = []
    for primitive, suite, benchmark in selected(options.only or CASES):
        for length in lengths:
            sized = benchmark.resized(1, length, options.narrower)
            dtype = options.dtype or benchmark.dtype
            row: dict[str, Any] = dict(primitive=primitive, case=benchmark.name, time=length, dtype=dtype)
            arrays = calls.draw(sized, dtype)
            row["shapes"] = {name: list(array.shape) for name, array in arrays.items()}
            function = calls.with_implementation(suite, sized, None)
            direction = calls.cotangent(function, arrays)
            compiled = jax.jit(calls.forward_and_backward(function)).lower(arrays, direction).compile()
            row["both_peak_bytes"] = peak_bytes(compiled)
            arguments = jax.device_put((arrays, direction))
            timing = interleaved({"both": lambda: compiled(*arguments)}, options.rounds)["both"]  # noqa: B023
            row |= {"both_ms": timing.median, "both_quartiles_ms": [timing.low, timing.high]}
            rows.append(row)
            report(row)
    return rows
