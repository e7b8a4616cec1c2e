"""The calls of `attention` that tests and benchmarks share."""

import numpy as np

from layers.kernels.attention import Logits, Mask, attention
from layers.kernels.suite import Benchmark, Case, Suite

HEADS, KV_HEADS, KEY, VALUE = 4, 2, 5, 3
BLOCK = 8


def _draw(rng, batch, time, heads=HEADS, kv_heads=KV_HEADS, key=KEY, value=VALUE):
    return {
        "q": rng.standard_normal((batch, time, heads, key)),
        "k": rng.standard_normal((batch, time, kv_heads, key)),
        "v": rng.standard_normal((batch, time, kv_heads, value)),
    }


def _slopes(rng, batch, time):
    return {**_draw(rng, batch, time), "logits": Logits(slopes=rng.uniform(0.1, 1.0, HEADS))}


def _sink(rng, batch, time):
    return {**_draw(rng, batch, time), "logits": Logits(sink_logits=rng.standard_normal(HEADS))}


def _prefix(rng, batch, time):
    return {**_draw(rng, batch, time), "mask": Mask(prefix_lengths=np.array([11]))}


def _blocks(rng, batch, time):
    """Lists for 160 positions, with padding, repetitions and blocks that do not exist, which differ between heads."""
    lists = rng.integers(-1, 22, (1, HEADS, 20, 4))
    mask = Mask(sink_tokens=5, block_indices=lists, block_size=BLOCK)
    return {**_draw(rng, batch, time), "mask": mask}


def _chosen(rng, batch, time):
    """A list for every two of 160 queries, empty in some rows."""
    lists = rng.integers(-1, 20, (1, HEADS, 80, 3))
    lists[:, :, ::7] = -1
    mask = Mask(block_indices=lists, block_size=BLOCK, query_block_size=2)
    return {**_draw(rng, batch, time), "mask": mask}


def _global(rng, batch, time):
    keys = rng.integers(-1, 40, (1, HEADS, 4))
    mask = Mask(window=2, dilation=3, global_keys=keys, global_queries=np.array([[0, 9, 9, -1, 400]]))
    return {**_draw(rng, batch, time), "mask": mask}


def _large(rng, batch, time):
    arguments = _draw(rng, batch, time)
    return {**arguments, "q": 5 * arguments["q"], "v": 1e6 * arguments["v"]}


def _benchmark(name, options, visible, batch=8, time=4096, heads=16, kv_heads=16, size=128):
    """A benchmark in which a query sees `visible` keys on average."""
    queries, keys = 2 * batch * time * heads * size, 2 * batch * time * kv_heads * size
    flops = 4 * batch * time * heads * size * visible
    return Benchmark(
        name,
        batch,
        time,
        lambda rng, batch, time, narrow: _draw(
            rng, batch, time, heads // narrow, max(1, kv_heads // narrow), size, size
        ),
        "bfloat16",
        forward_bytes=2 * queries + 2 * keys,
        backward_bytes=4 * queries + 4 * keys,
        forward_flops=flops,
        backward_flops=5 * flops // 2,
        quadratic="mask" not in options,
        options=options,
    )


SUITE = Suite(
    function=attention,
    implementations=("xla",),
    gpu_implementations=("cudnn",),
    tpu_implementations=("tpu",),
    time_arguments=("q", "k", "v"),
    cases=(
        Case("causal", _draw, {"causal": True}),
        Case("bidirectional_capped", _draw, {"logits": Logits(logit_cap=2.0), "scale": 0.7}),
        Case("window_sinks_slopes", _slopes, {"causal": True, "mask": Mask(window=9, sink_tokens=3)}),
        Case("window_bidirectional_sink_logits", _sink, {"mask": Mask(window=6)}),
        Case("prefix", _prefix, {"causal": True}),
        Case("blocks", _blocks),
        Case("chosen_blocks", _chosen, {"causal": True}),
        Case("dilated_window_global_tokens", _global, indexed=True),
        Case("large_values", _large, {"causal": True}),
    ),
    benchmarks=(
        _benchmark("causal", {"causal": True}, 2048),
        _benchmark("causal, capped logits", {"causal": True, "logits": Logits(logit_cap=50.0)}, 2048),
        _benchmark("window of 512", {"causal": True, "mask": Mask(window=512)}, 480),
        _benchmark("window of 512, 4 sinks", {"causal": True, "mask": Mask(window=512, sink_tokens=4)}, 484),
        _benchmark("bidirectional, 4 kv heads", {}, 4096, kv_heads=4),
    ),
)
