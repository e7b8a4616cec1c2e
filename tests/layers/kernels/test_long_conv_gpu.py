"""The Triton kernels of `long_conv`: interpreted, lowered, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, pallas_triton
from layers.kernels.long_conv import gpu, long_conv
from layers.kernels.long_conv.cases import SUITE
from layers.kernels.long_conv.gpu import transforms
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_linear_recurrence_gpu import over_one_device, poisoned

CASES = {case.name: case for case in SUITE.cases}
# Blocks of 64 tokens.
SMALL = ((16, 8, 1),)
TOLERANCE = shared.TOLERANCE["bfloat16"]


def check(arguments):
    """Compares results and all gradients with the float64 reference."""
    arguments = shared.cast(arguments, "bfloat16") | {"kernel": jnp.asarray(arguments["kernel"], jnp.float32)}
    got, want, _ = shared.beside_reference(SUITE, CASES["as_long"], "gpu", arguments)
    shared.close(got, want, TOLERANCE, "results and gradients")


def arguments_of(rng, batch, time, width, taps, gates=()):
    """Arguments with a skip weight and gates."""
    arguments = {
        "x": rng.standard_normal((batch, time, width)),
        "kernel": rng.standard_normal((width, taps)) * np.exp(-np.arange(taps) / taps),
        "skip": rng.standard_normal(width),
    }
    return arguments | {gate: rng.standard_normal((batch, time, width)) for gate in gates}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3, 50, 2, 50), (2, 200, 3, 200), (1, 200, 1, 40), (4, 130, 2, 300)], ids=str)
@pytest.mark.parametrize("gates", [(), ("input_gate",), ("input_gate", "output_gate")], ids=len)
def test_interpreted(monkeypatch, sizes, gates):
    """One block and several, an odd number of rows, fewer taps than tokens and more."""
    monkeypatch.setattr(transforms, "SHAPES", SMALL)
    with pallas_triton.interpreted():
        check(arguments_of(np.random.default_rng(0), *sizes, gates))
