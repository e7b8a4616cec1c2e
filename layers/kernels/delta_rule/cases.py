"""The calls of `delta_rule` and `dplr_delta_rule` that tests and benchmarks share."""

import numpy as np

from layers.kernels.delta_rule import delta_rule, dplr_delta_rule
from layers.kernels.suite import Benchmark, Case, Suite

HEADS, KEY_DIM, VALUE_DIM = 2, 5, 4


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _plain(rng, batch, time, heads=HEADS, groups=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM):
    """Inputs with keys of norm 1, which keep the state bounded."""
    return {
        "q": rng.standard_normal((batch, time, groups, key_dim)),
        "k": _unit(rng.standard_normal((batch, time, groups, key_dim))),
        "v": rng.standard_normal((batch, time, heads, value_dim)),
        "beta": rng.uniform(0.05, 0.95, (batch, time, heads)),
    }


def _scalar(rng, batch, time, **sizes):
    arguments = _plain(rng, batch, time, **sizes)
    return {**arguments, "log_decay": -rng.exponential(0.2, arguments["beta"].shape)}


def _channel(rng, batch, time, **sizes):
    arguments = _plain(rng, batch, time, **sizes)
    shape = (*arguments["beta"].shape, arguments["k"].shape[-1])
    return {**arguments, "log_decay": -rng.exponential(0.2, shape)}


def _normalized_grouped(rng, batch, time):
    """Raw queries and keys with fewer heads than values, and writing strengths up to 2."""
    arguments = _scalar(rng, batch, time, groups=1)
    k, beta = rng.standard_normal(arguments["k"].shape), rng.uniform(0.05, 1.95, arguments["beta"].shape)
    return {**arguments, "k": 3.0 * k, "beta": beta}


def _grouped_channel_large(rng, batch, time):
    arguments = _channel(rng, batch, time, groups=1)
    return {**arguments, "v": 1e6 * arguments["v"]}


def _strong(arguments, rng):
    """The arguments with a log-decay of -20 in half of the places."""
    shape = arguments["log_decay"].shape
    return {**arguments, "log_decay": np.where(rng.random(shape) < 0.5, -20.0, -0.01)}


def _strong_scalar(rng, batch, time):
    return _strong(_scalar(rng, batch, time), rng)


def _strong_channel(rng, batch, time):
    return _strong(_channel(rng, batch, time), rng)


def _rwkv7(rng, batch, time, heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM):
    """Decays and low-rank factors in the ranges of RWKV-7."""
    shape = (batch, time, heads, key_dim)
    kappa, eta = _unit(rng.standard_normal(shape)), rng.uniform(0.0, 1.0, shape)
    return {
        "q": rng.standard_normal(shape),
        "k": rng.standard_normal(shape),
        "v": rng.standard_normal((batch, time, heads, value_dim)),
        "a": -kappa,
        "b": eta * kappa,
        "log_decay": -np.exp(-0.5) / (1 + np.exp(-rng.standard_normal(shape))),
    }


def _strong_scalar_dplr(rng, batch, time):
    """a = -w kappa; otherwise w + b a^T would not contract where the decay is strong."""
    arguments = _rwkv7(rng, batch, time)
    log_decay = np.where(rng.random((batch, time, HEADS)) < 0.5, -20.0, -0.01)
    return {**arguments, "log_decay": log_decay, "a": np.exp(log_decay)[..., None] * arguments["a"]}


def _state(rng, batch):
    return rng.standard_normal((batch, HEADS, KEY_DIM, VALUE_DIM))


def _benchmark(name, draw, inputs, products, *, batch=8, time=4096, heads=16):
    """A benchmark with heads of 128, all in bfloat16, whose bytes count the arrays as large as q.

    Args:
      name: see `Benchmark`.
      draw: a function of the cases above.
      inputs: number of its arrays that are as large as q.
      products: matrix products per chunk of 64: those with one of the chunk's own matrices, and those with the state.
      batch, time, heads: sizes of the call.
    """
    size, chunk = 128, 64
    numbers = batch * time * heads * size
    flops = 2 * numbers * (products[0] * chunk + products[1] * size)

    def narrowed(rng, batch, time, narrow):
        sizes = {"heads": heads // narrow, "key_dim": size, "value_dim": size}
        return draw(rng, batch, time, **(sizes if draw is _rwkv7 else {**sizes, "groups": heads // narrow}))

    return Benchmark(
        name,
        batch,
        time,
        narrowed,
        "bfloat16",
        forward_bytes=2 * numbers * (inputs + 1),
        backward_bytes=2 * numbers * (2 * inputs + 1),
        forward_flops=flops,
        backward_flops=2 * flops,
    )


SUITE = Suite(
    function=delta_rule,
    implementations=("xla",),
    gpu_implementations=("gpu",),
    tpu_implementations=("tpu",),
    time_arguments=("q", "k", "v", "beta", "log_decay"),
    cases=(
        Case("plain", _plain, {"scale": 0.7}, state=_state, tpu=True),
        Case(
            "scalar_decay_normalized_grouped",
            _normalized_grouped,
            {"normalize_qk": True},
            state=_state,
            tpu=True,
        ),
        Case("channel_decay_grouped_large_values", _grouped_channel_large, state=_state),
        Case("strong_scalar_decay", _strong_scalar, state=_state, tpu=True),
        Case("strong_channel_decay", _strong_channel, state=_state),
    ),
    benchmarks=(
        _benchmark("delta rule", _plain, 3, (5, 3)),
        _benchmark("gated delta rule", _scalar, 3, (5, 3)),
        _benchmark("gated delta rule on one row", _scalar, 3, (5, 3), batch=1, time=32768, heads=8),
        _benchmark("KDA", _channel, 4, (5, 3)),
    ),
)

DPLR_SUITE = Suite(
    function=dplr_delta_rule,
    implementations=("xla",),
    gpu_implementations=("gpu",),
    time_arguments=("q", "k", "v", "a", "b", "log_decay"),
    cases=(
        Case("rwkv7", _rwkv7, {"scale": 1.0}, state=_state),
        Case("strong_scalar_decay", _strong_scalar_dplr, state=_state),
    ),
    benchmarks=(_benchmark("RWKV-7", _rwkv7, 6, (9, 4)),),
)
