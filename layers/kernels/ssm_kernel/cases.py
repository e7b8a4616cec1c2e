"""The calls of `ssm_kernel` that tests and benchmarks share.

A kernel has no batch and no sequence. The batch of a case is the first axis of c, several outputs of one system. Its time
is the length of the kernel, which the suite gets as the shape of an array.
"""

import numpy as np

from layers.kernels import checks
from layers.kernels.ssm_kernel import ssm_kernel
from layers.kernels.suite import Benchmark, Case, Suite

WIDTH, STATES = 3, 4
PAIRS = 32


def of_length(steps, *, b=None, **arguments):
    """`ssm_kernel` with the length of `steps`."""
    checks.check_shape("steps", steps, "l", {})
    return ssm_kernel(b=b, length=steps.shape[0], **arguments)


def _system(rng, batch, time, width, states):
    """The arrays that all cases have: frequencies as in S4D-Lin, and steps from 0.001 to 0.1."""
    a = -0.5 + 1j * np.pi * np.arange(states)[None] * rng.uniform(0.8, 1.2, (1, states))
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), width))
    return {
        "a": a,
        "c": _complex_normal(rng, batch, width, states),
        "dt": dt,
        "steps": np.zeros(time, np.int32),
    }


def _with_input(rng, batch, time):
    return _system(rng, batch, time, WIDTH, STATES) | {"b": _complex_normal(rng, 1, STATES)}


def _by_channel(rng, batch, time):
    system = _system(rng, batch, time, WIDTH, STATES)
    return system | {"a": system["a"] * rng.uniform(0.5, 2, (WIDTH, 1))}


def _real(rng, batch, time):
    system = _system(rng, batch, time, WIDTH, STATES)
    return system | {"a": -1.0 - np.arange(STATES)[None], "c": system["c"].real}


def _softmax(rng, batch, time):
    system = _system(rng, batch, time, WIDTH, STATES)
    return system | {"a": system["a"] + np.array([[0, 0.7, 0, 1.5]])}


def _low_rank(rank, width=WIDTH, states=STATES):
    def draw(rng, batch, time):
        system = _system(rng, batch, time, width, states)
        return system | {"b": _complex_normal(rng, 1, states), "p": _complex_normal(rng, 1, states, rank)}

    return draw


def _truncated(rng, batch, time):
    # With this output given, a kernel over times in which the modes hardly change does not depend on dt; its gradient
    # would be a difference of large numbers. So the steps are longer here, and at least eight.
    system = _low_rank(2)(rng, batch, time + 8)
    return system | {"dt": 10 * system["dt"]}


def _complex_normal(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def _benchmark(name, draw, flops, options, matrix_products):
    """A benchmark of 512 channels and 16384 steps; `flops` counts per term of the sum over states."""
    width, length = 512, 16384
    kernel = 4 * width * length
    return Benchmark(
        name,
        1,
        length,
        lambda rng, batch, time, narrow: draw(rng, batch, time, width // narrow),
        "float32",
        forward_bytes=kernel,
        backward_bytes=kernel,
        forward_flops=flops * PAIRS * width * length,
        backward_flops=2 * flops * PAIRS * width * length,
        matrix_products=matrix_products,
        options=options,
    )


def _diagonal(rng, batch, time, width):
    return _system(rng, batch, time, width, PAIRS)


def _wide_low_rank(rng, batch, time, width):
    return _low_rank(1, width, PAIRS)(rng, batch, time)


BILINEAR = {"discretization": "bilinear"}

SUITE = Suite(
    function=of_length,
    implementations=("xla",),
    time_arguments=("c",),
    cases=(
        Case("zoh", _with_input, segments=False),
        Case("bilinear", _by_channel, BILINEAR, segments=False),
        Case("real", _real, {"conjugate_pairs": False}, segments=False),
        Case("softmax", _softmax, {"discretization": "softmax", "conjugate_pairs": False}, segments=False),
        Case("low_rank", _low_rank(1), BILINEAR, segments=False),
        Case("low_rank_truncated", _truncated, BILINEAR | {"truncated": True}, segments=False),
    ),
    benchmarks=(
        # The sum over states as a product of real matrices; for Cauchy sums, four of half as many complex terms.
        _benchmark("diagonal (S4D)", _diagonal, 4, {}, True),
        _benchmark("low rank (S4)", _wide_low_rank, 4, BILINEAR, True),
        _benchmark("low rank, truncated", _wide_low_rank, 16, BILINEAR | {"truncated": True}, False),
    ),
)
