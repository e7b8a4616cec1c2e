"""The calls of `selective_scan` that tests and benchmarks share."""

import numpy as np

from layers.kernels.selective_scan import selective_scan
from layers.kernels.suite import Benchmark, Case, Suite

CHANNELS, STATES = 6, 3


def _scan(rng, batch, time, channels=CHANNELS, groups=1, states=STATES):
    """Inputs whose step sizes dt are positive; the cases with a softplus draw any number."""
    return {
        "x": rng.standard_normal((batch, time, channels)),
        "dt": np.exp(rng.uniform(np.log(1e-3), 0.0, (batch, time, channels))),
        "a": -rng.uniform(0.5, 2.0, (channels, states)),
        "b": rng.standard_normal((batch, time, groups, states)),
        "c": rng.standard_normal((batch, time, groups, states)),
    }


def _mamba(rng, batch, time, channels=CHANNELS, groups=1, states=STATES):
    return {
        **_scan(rng, batch, time, channels, groups, states),
        "dt": rng.standard_normal((batch, time, channels)) - 1.0,
        "a": -np.broadcast_to(np.arange(1.0, states + 1), (channels, states)),
        "skip": rng.standard_normal(channels),
        "gate": rng.standard_normal((batch, time, channels)),
        "dt_bias": rng.standard_normal(channels),
    }


def _grouped(rng, batch, time):
    arguments = _mamba(rng, batch, time, groups=3)
    return {k: arguments[k] for k in ("x", "dt", "a", "b", "c", "dt_bias")}


def _strong(rng, batch, time):
    """Inputs of which half of the steps reset the state, with a log-decay of -20."""
    arguments = _scan(rng, batch, time)
    strong = rng.random((batch, time, CHANNELS)) < 0.5
    gate = rng.standard_normal((batch, time, CHANNELS))
    return {**arguments, "dt": np.where(strong, 20.0, 1e-3), "a": -np.ones((CHANNELS, STATES)), "gate": gate}


def _large(rng, batch, time):
    arguments = _mamba(rng, batch, time)
    return {**arguments, "x": 1e6 * arguments["x"], "dt": 10 * arguments["dt"]}


def _state(rng, batch):
    return rng.standard_normal((batch, CHANNELS, STATES))


_BATCH, _TIME, _WIDTH = 8, 4096, 4096
_ELEMENTS = _BATCH * _TIME * _WIDTH

SUITE = Suite(
    function=selective_scan,
    implementations=("xla",),
    gpu_implementations=("gpu", "gpu_pieces"),
    time_arguments=("x", "dt", "b", "c", "gate"),
    cases=(
        Case("plain", _scan, state=_state),
        Case("mamba", _mamba, {"dt_softplus": True}, state=_state),
        Case("grouped", _grouped, {"dt_softplus": True}, state=_state),
        Case("strong_decay", _strong, state=_state),
        Case("large_values", _large, {"dt_softplus": True}, state=_state),
    ),
    benchmarks=(
        Benchmark(
            "Mamba",
            _BATCH,
            _TIME,
            lambda rng, batch, time, narrow: _mamba(rng, batch, time, _WIDTH // narrow, 1, 16),
            "bfloat16",
            forward_bytes=2 * (4 * _ELEMENTS + 2 * _BATCH * _TIME * 16),
            backward_bytes=2 * (7 * _ELEMENTS + 4 * _BATCH * _TIME * 16),
            # Per state: log-decay, exponential (as one), decay and input of the state, readout; twice that backward.
            forward_flops=7 * 16 * _ELEMENTS,
            backward_flops=18 * 16 * _ELEMENTS,
            matrix_products=False,
            options={"dt_softplus": True},
        ),
    ),
)
