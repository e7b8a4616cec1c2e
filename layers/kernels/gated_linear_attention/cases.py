"""The calls of `gated_linear_attention` that tests and benchmarks share."""

import numpy as np

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.suite import Benchmark, Case, Suite

HEADS, KEYS, VALUES = 4, 6, 5


def _tokens(rng, batch, time, *, q=HEADS, k=HEADS, v=HEADS, keys=KEYS, values=VALUES):
    """Queries, keys and values with q, k and v heads."""
    return {
        "q": rng.standard_normal((batch, time, q, keys)),
        "k": rng.standard_normal((batch, time, k, keys)),
        "v": rng.standard_normal((batch, time, v, values)),
    }


def _mixed(rng, *shape):
    """Log-decay that is -20 or nearly 0, at random."""
    return np.where(rng.random(shape) < 0.3, -20.0, -0.02 * rng.random(shape))


def _none(rng, batch, time):
    return _tokens(rng, batch, time, k=2, v=2)


def _fixed(rng, batch, time):
    return {**_tokens(rng, batch, time), "log_decay": np.log1p(-(2.0 ** -np.arange(2, 2 + HEADS)))}


def _scalar(rng, batch, time):
    return {**_tokens(rng, batch, time, q=1, k=1), "log_decay": _mixed(rng, batch, time, HEADS)}


def _scalar_bonus(rng, batch, time):
    tokens = _tokens(rng, batch, time, q=2)
    bonus = rng.standard_normal((HEADS, KEYS))
    return {**tokens, "log_decay": -rng.random((batch, time, HEADS)), "bonus": bonus}


def _channel(rng, batch, time):
    return {**_tokens(rng, batch, time), "log_decay": _mixed(rng, batch, time, HEADS, KEYS)}


def _channel_bonus(rng, batch, time):
    log_decay = -np.exp(rng.standard_normal((batch, time, HEADS, KEYS)) - 2)
    return {**_tokens(rng, batch, time), "log_decay": log_decay, "bonus": rng.standard_normal((HEADS, KEYS))}


def _fixed_channel(rng, batch, time):
    return {
        "q": np.exp(0.5 * rng.standard_normal((batch, time, HEADS, KEYS))),
        "k": np.exp(0.5 * rng.standard_normal((batch, time, 2, KEYS))),
        "v": rng.standard_normal((batch, time, HEADS, VALUES)),
        "log_decay": -0.1 * rng.random((1, 1, HEADS, KEYS)),
    }


def _state(rng, batch):
    return rng.standard_normal((batch, HEADS, KEYS, VALUES))


def _sums(rng, batch):
    """An initial state with its sum of keys."""
    keys = np.exp(0.5 * rng.standard_normal((batch, HEADS, 7, KEYS, 1)))
    values = np.concatenate(
        [rng.standard_normal((batch, HEADS, 7, 1, VALUES)), np.ones((batch, HEADS, 7, 1, 1))], -1
    )
    return (keys * values).sum(2)


_BATCH, _TIME, _WIDTH = 8, 4096, 128


def _benchmark(name, decays, *, bonus=False, batch=_BATCH, time=_TIME, heads=16, keys=_WIDTH, values=_WIDTH):
    """A benchmark in bfloat16, with `decays` numbers of log-decay per token and head: 0, 1 or `keys`."""
    numbers = batch * time * heads

    def draw(rng, batch, time, narrow):
        count = heads // narrow
        tokens = _tokens(rng, batch, time, q=count, k=count, v=count, keys=keys, values=values)
        shape = {0: None, 1: (batch, time, count), keys: (batch, time, count, keys)}[decays]
        if shape is not None:
            tokens["log_decay"] = -0.1 * rng.random(shape)
        if bonus:
            tokens["bonus"] = rng.standard_normal((count, keys))
        return tokens

    return Benchmark(
        name,
        batch,
        time,
        draw,
        "bfloat16",
        forward_bytes=2 * numbers * (2 * keys + 2 * values + decays),
        backward_bytes=2 * numbers * (4 * keys + 3 * values + 2 * decays),
        # Chunks of 64: scores and their use, states and their use; twice that, and the scores again, for the backward pass.
        forward_flops=numbers * (2 * 64 * (keys + values) + 4 * keys * values),
        backward_flops=numbers * (5 * 64 * (keys + values) + 10 * keys * values),
    )


def _mamba2(rng, batch, time, narrow):
    """Heads of 64 that share one group of 128 keys."""
    heads = 64 // narrow
    tokens = _tokens(rng, batch, time, q=1, k=1, v=heads, keys=128, values=64)
    return tokens | {"log_decay": -0.1 * rng.random((batch, time, heads))}


_VALUES = _BATCH * _TIME * 64 * 64
_MAMBA2 = Benchmark(
    "Mamba-2",
    _BATCH,
    _TIME,
    _mamba2,
    "bfloat16",
    forward_bytes=2 * (2 * _VALUES + _BATCH * _TIME * (2 * 128 + 64)),
    backward_bytes=2 * (3 * _VALUES + _BATCH * _TIME * (4 * 128 + 2 * 64)),
    # Chunks of 64, as above; heads share the scores of their group.
    forward_flops=_VALUES * (2 * 64 + 4 * 128),
    backward_flops=_VALUES * (5 * 64 + 10 * 128),
)

SUITE = Suite(
    function=gated_linear_attention,
    implementations=("xla",),
    tpu_implementations=("tpu",),
    gpu_implementations=("gpu",),
    time_arguments=("q", "k", "v", "log_decay"),
    cases=(
        Case("scalar", _scalar, state=_state, tpu=True),
        Case("no_decay", _none, {"scale": 1.5}, state=_state),
        Case("fixed_decay", _fixed, state=_state, tpu=True),
        Case("scalar_bonus", _scalar_bonus, {"scale": 1.0}, state=_state),
        Case("channel", _channel, state=_state),
        Case("channel_bonus", _channel_bonus, {"scale": 1.0}, state=_state),
        Case("normalized_fixed_channel", _fixed_channel, {"normalize": True}, state=_sums),
    ),
    benchmarks=(
        _benchmark("no decay", 0),
        _benchmark("scalar decay", 1),
        _benchmark("scalar decay on one row", 1, batch=1, time=32768, heads=8),
        _benchmark("scalar decay, values of 256", 1, heads=8, values=256),
        _benchmark("channel decay", _WIDTH),
        _benchmark("channel decay, keys of 96", 96, heads=8, keys=96, values=192),
        _benchmark("channel decay, bonus", _WIDTH, bonus=True),
        _MAMBA2,
    ),
)
