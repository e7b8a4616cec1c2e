"""The calls of `long_conv` that tests and benchmarks share."""

import numpy as np

from layers.kernels.long_conv import long_conv
from layers.kernels.suite import Benchmark, Case, Suite

WIDTH = 3


def _real(taps=None, gates=(), skip=False, width=WIDTH):
    """Returns a draw of x, a decaying kernel of `taps` taps (one per step if None), gates and the skip weight."""

    def draw(rng, batch, time):
        l = max(1, time) if taps is None else taps
        decay = np.exp(-np.arange(l) / (1 + l / 4))
        arguments = {"x": _normal(rng, batch, time, width), "kernel": _normal(rng, width, l) * decay}
        if skip:
            arguments["skip"] = _normal(rng, width)
        return arguments | {gate: _normal(rng, batch, time, width) for gate in gates}

    return draw


def _complex(taps, real_input=False):
    def draw(rng, batch, time):
        x, kernel = (
            _normal(rng, *shape) + 1j * _normal(rng, *shape)
            for shape in ((batch, time, WIDTH), (WIDTH, taps))
        )
        return {"x": x.real if real_input else x, "kernel": kernel, "skip": _normal(rng, WIDTH)}

    return draw


def _normal(rng, *shape):
    return rng.standard_normal(shape)


def _state(taps):
    return lambda rng, batch: _normal(rng, batch, taps - 1, WIDTH)


GATES = ("input_gate", "output_gate")


def _benchmark(name, batch, time, width, taps=None, gates=()):
    """A benchmark with a kernel of `taps` taps, one per step if None."""
    elements = batch * time * width
    length = time if taps is None else taps
    kernel = 4 * width * length
    size = 2 ** int(np.ceil(np.log2(time + length - 1)))
    transform = 2.5 * batch * width * size * np.log2(size)
    return Benchmark(
        name,
        batch,
        time,
        lambda rng, batch, time, narrow: _real(taps, gates, True, width // narrow)(rng, batch, time),
        "bfloat16",
        forward_bytes=(2 + len(gates)) * 2 * elements + kernel,
        backward_bytes=(3 + 2 * len(gates)) * 2 * elements + 2 * kernel,
        forward_flops=int(2 * transform),
        backward_flops=int((3 + len(gates) / 2) * transform),
        matrix_products=False,
    )


SUITE = Suite(
    function=long_conv,
    implementations=("xla", "toeplitz"),
    gpu_implementations=("gpu",),
    time_arguments=("x", *GATES),
    cases=(
        Case("as_long", _real(skip=True), segments=False),
        Case("short_state", _real(9, skip=True), state=_state(9), segments=False),
        Case("long_gated_state", _real(143, GATES, skip=True), state=_state(143), segments=False),
        Case("circular", _real(21), {"circular": True}, segments=False),
        Case("circular_gated_long", _real(150, GATES, skip=True), {"circular": True}, segments=False),
        Case("complex_state", _complex(12), state=_state(12), segments=False),
        Case("complex_kernel", _complex(40, real_input=True), segments=False),
    ),
    benchmarks=(
        _benchmark("as long as the input", 8, 4096, 2048),
        _benchmark("two gates", 8, 4096, 2048, gates=GATES),
        _benchmark("many short rows", 64, 1024, 768),
        _benchmark("long rows", 16, 32768, 768),
        _benchmark("128 taps", 8, 4096, 2048, 128),
    ),
)
