"""The study `scaling`: time and memory of the primitives whose cost should be proportional to the length, and of whole mixers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.benchmark import calls, mixer_scaling, processes
from experiments.benchmark.kernels import Options, selected
from experiments.benchmark.timing import interleaved, peak_bytes

# One or two cases per primitive; those with a kernel of fixed length or a quadratic cost are left out.
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


def run(
    options: Options, lengths: Sequence[int], report: Callable[[dict], None], say: processes.Say
) -> list[dict]:
    """Returns times of both passes at each length, for a batch of one; `report` receives each row as it is known.

    `options.only` names primitives, their cases, and mixers ("mixer/reformer", or "mixer" for all of `mixer_scaling.CASES`). Everything is compiled before the first measurement, so that compilers do not slow down measurements.

    Raises:
      ValueError: unknown names in `options.only`.
    """
    keys = [(*case, length) for case in chosen(options.only) for length in lengths]
    return processes.run(functools.partial(_prepare, options), keys, options.workers, report, say)


def chosen(only: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the cases that names mean, as "mixer" or a primitive and a name; all of `CASES` without names.

    Raises:
      ValueError: a name is of no case.
    """
    mixers = [name for name in only if name.partition("/")[0] == mixer_scaling.PREFIX]
    primitives = tuple(name for name in only if name not in mixers)
    cases = [(mixer_scaling.PREFIX, name) for name in mixer_scaling.chosen(mixers)]
    if primitives or not mixers:
        cases += [(primitive, case.name) for primitive, _, case in selected(primitives or CASES)]
    return cases


def _prepare(options: Options, key: tuple[str, str, int], say: processes.Say) -> processes.Ready:
    """Compiles both passes at one length."""
    *case, length = key
    if case[0] == mixer_scaling.PREFIX:
        return mixer_scaling.prepare(options.dtype or "float32", options.rounds, case[1], length, say)
    ((primitive, suite, benchmark),) = selected(("/".join(case),))
    sized = benchmark.resized(1, length, options.narrower)
    dtype = options.dtype or benchmark.dtype
    arrays = calls.draw(sized, dtype)
    function = calls.with_implementation(suite, sized, None)
    arguments = arrays, calls.cotangent(function, arrays)
    compiled = jax.jit(calls.forward_and_backward(function)).lower(*arguments).compile()
    row = dict(
        primitive=primitive,
        case=benchmark.name,
        time=length,
        dtype=dtype,
        shapes={name: list(array.shape) for name, array in arrays.items()},
        both_peak_bytes=peak_bytes(compiled),
    )
    say(f"{primitive}/{benchmark.name}, {length} tokens: ready")

    def measure() -> list[dict[str, Any]]:
        call = functools.partial(compiled, *jax.device_put(arguments))
        timing = interleaved({"both": call}, options.rounds)["both"]
        return [row | {"both_ms": timing.median, "both_quartiles_ms": [timing.low, timing.high]}]

    return processes.Ready(measure, row["both_peak_bytes"])
