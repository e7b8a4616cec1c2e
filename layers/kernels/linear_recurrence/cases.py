"""The calls of `linear_recurrence` that tests and benchmarks share."""

import numpy as np

from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.suite import Benchmark, Case, Suite

WIDTH = 5


def _real(rng, batch, time, width=WIDTH):
    return {"a": rng.uniform(0.2, 1.0, (batch, time, width)), "x": rng.standard_normal((batch, time, width))}


def _complex(rng, batch, time, width=WIDTH):
    shape = (batch, time, width)
    a = rng.uniform(0.5, 0.9999, shape) * np.exp(1j * rng.uniform(-np.pi, np.pi, shape))
    return {"a": a, "x": _complex_normal(rng, *shape)}


def _complex_normal(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def _invariant(rng, batch, time, width=WIDTH):
    arguments = _complex(rng, batch, time, width)
    return {**arguments, "a": arguments["a"][:1, :1] if time else np.ones((1, 1, width), complex)}


def _real_input(rng, batch, time):
    return {"a": _invariant(rng, batch, time)["a"], "x": rng.standard_normal((batch, time, WIDTH))}


def _strong(rng, batch, time):
    log_decay = np.where(rng.random((batch, time, WIDTH)) < 0.5, -20.0, -0.01)
    return {"a": np.exp(log_decay), "x": rng.standard_normal((batch, time, WIDTH))}


def _large(rng, batch, time):
    return {**_real(rng, batch, time), "x": 1e6 * rng.standard_normal((batch, time, WIDTH))}


def _real_state(rng, batch):
    return rng.standard_normal((batch, WIDTH))


def _complex_state(rng, batch):
    return _complex_normal(rng, batch, WIDTH)


_ELEMENTS = 8 * 4096 * 2048

SUITE = Suite(
    function=linear_recurrence,
    implementations=("xla",),
    gpu_implementations=("gpu",),
    tpu_implementations=("tpu",),
    time_arguments=("a", "x"),
    cases=(
        Case("real", _real, state=_real_state, tpu=True),
        Case("real_reverse", _real, {"reverse": True}, state=_real_state),
        Case("complex", _complex, state=_complex_state),
        Case("complex_reverse", _complex, {"reverse": True}, state=_complex_state),
        Case("time_invariant", _invariant, state=_complex_state),
        Case(
            "time_invariant_real_input_reverse",
            _real_input,
            {"reverse": True},
            state=_complex_state,
            tpu=True,
        ),
        Case("strong_decay", _strong, state=_real_state),
        Case("large_values", _large, state=_real_state),
    ),
    benchmarks=(
        Benchmark(
            "real",
            8,
            4096,
            lambda rng, batch, time, narrow: _real(rng, batch, time, 2048 // narrow),
            "float32",
            forward_bytes=3 * 4 * _ELEMENTS,
            backward_bytes=5 * 4 * _ELEMENTS,
            forward_flops=2 * _ELEMENTS,
            backward_flops=3 * _ELEMENTS,
            matrix_products=False,
        ),
        Benchmark(
            "real in bfloat16",
            8,
            4096,
            lambda rng, batch, time, narrow: _real(rng, batch, time, 2048 // narrow),
            "bfloat16",
            forward_bytes=3 * 2 * _ELEMENTS,
            backward_bytes=5 * 2 * _ELEMENTS,
            forward_flops=2 * _ELEMENTS,
            backward_flops=3 * _ELEMENTS,
            matrix_products=False,
        ),
        # As S5 and LRU call it; half as many channels, because each holds two numbers.
        Benchmark(
            "complex with fixed factors",
            8,
            4096,
            lambda rng, batch, time, narrow: _invariant(rng, batch, time, 1024 // narrow),
            "float32",
            forward_bytes=2 * 4 * _ELEMENTS,
            backward_bytes=3 * 4 * _ELEMENTS,
            forward_flops=4 * _ELEMENTS,
            backward_flops=8 * _ELEMENTS,
            matrix_products=False,
        ),
    ),
)
