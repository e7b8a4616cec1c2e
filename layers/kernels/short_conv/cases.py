"""The calls of `short_conv` that tests and benchmarks share."""

import jax
import numpy as np

from layers.kernels.segments import Segments
from layers.kernels.short_conv import short_conv
from layers.kernels.suite import Benchmark, Case, Suite

CHANNELS = 5


def _convolution(width, channels=CHANNELS, bias=True):
    def draw(rng, batch, time):
        arguments = {
            "x": rng.standard_normal((batch, time, channels)),
            "weight": rng.uniform(-1.0, 1.0, (width, channels)) * width**-0.5,
        }
        return arguments | ({"bias": rng.standard_normal(channels)} if bias else {})

    return draw


def _large(rng, batch, time):
    arguments = _convolution(3)(rng, batch, time)
    return {**arguments, "x": 1e6 * arguments["x"]}


def _state(width):
    return lambda rng, batch: rng.standard_normal((batch, width - 1, CHANNELS))


def _packed(rng, batch, time):
    """Rows of four sequences, as data pipelines make them."""
    borders = np.sort(rng.integers(0, time, (batch, 3)))
    ids = 1 + (np.arange(time)[None, :, None] >= borders[:, None]).sum(2, dtype=np.int32)
    return jax.tree.map(np.asarray, Segments.of(ids, padding="end"))


def _benchmark(name, dtype, channels, packed=False):
    elements = 8 * 4096 * channels
    size = 2 if dtype == "bfloat16" else 4

    def draw(rng, batch, time, narrow):
        arguments = _convolution(4, channels // narrow)(rng, batch, time)
        return arguments | ({"segment_ids": _packed(rng, batch, time)} if packed else {})

    return Benchmark(
        name,
        8,
        4096,
        draw,
        dtype,
        forward_bytes=2 * size * elements,
        backward_bytes=3 * size * elements,
        forward_flops=2 * 4 * elements,
        backward_flops=6 * 4 * elements,
        matrix_products=False,
        options={"activation": "silu"},
    )


SUITE = Suite(
    function=short_conv,
    implementations=("xla",),
    gpu_implementations=("gpu",),
    tpu_implementations=("tpu",),
    time_arguments=("x",),
    cases=(
        Case("width_2", _convolution(2, bias=False), state=_state(2)),
        Case("width_4_silu", _convolution(4), {"activation": "silu"}, state=_state(4)),
        Case("width_8", _convolution(8), state=_state(8)),
        Case("width_8_silu_no_bias", _convolution(8, bias=False), {"activation": "silu"}, state=_state(8)),
        Case("large_values", _large, {"activation": "silu"}, state=_state(3)),
    ),
    benchmarks=(
        _benchmark("4 taps, SiLU", "bfloat16", 4096),
        _benchmark("4 taps, SiLU, 2048 channels", "bfloat16", 2048),
        _benchmark("4 taps, SiLU, 2048 channels in float32", "float32", 2048),
        _benchmark("4 taps, SiLU, 2048 channels, packed rows", "bfloat16", 2048, packed=True),
    ),
)
