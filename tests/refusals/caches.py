"""Policies of caches that do not fit, by themselves or with a model."""

import numpy as np

import seqmodels
from experiments.analysis.positions import losses_by_position
from layers.caches import read_cache
from layers.caches.attention_gate import AttentionGate
from layers.caches.locret import Locret
from layers.caches.trained import Trained
from tests.refusals.models import model

LRU = dict(pattern=("lru",), mixer_defaults={})
WINDOW = dict(mixers={"attention": dict(window=4)})


def read(cache):
    return lambda: read_cache(cache)


def continued(cache, *, lookup=None, **changes):
    """A call of `generate` on a prompt of five tokens, by a model of shapes alone."""
    return lambda: seqmodels.stream(
        model(**changes)(), [[1, 2, 3, 4, 5]], max_new_tokens=4, cache=cache, lookup=lookup
    )


ROWS = [
    (read("snapvk"), ValueError, "unknown cache 'snapvk'; did you mean 'snapkv'?"),
    (read("snapkv(budgets=8)"), ValueError, "cache 'snapkv' has no option 'budgets'; did you mean 'budget'?"),
    (
        read("snapkv(8)"),
        ValueError,
        "cache='snapkv(8)'; expected a name with options, each once, such as snapkv(",
    ),
    (read("snapkv(budget=8"), ValueError, "cache='snapkv(budget=8'; expected a name with options"),
    (read("snapkv(budget=8, budget=9)"), ValueError, "expected a name with options, each once, such as"),
    (read("snapkv(**{'budget': 8})"), ValueError, "expected a name with options, each once, such as"),
    (read("snapkv(budget=8+1)"), ValueError, "cache='snapkv(budget=8+1)'; expected a name with options"),
    (read(8), TypeError, "cache is a int; expected a text such as 'snapkv(budget=1024)'"),
    (read("snapkv(budget=0)"), ValueError, "budget=0; expected at least 1"),
    (read("snapkv(budget=8, window=9)"), ValueError, "budget=8 of the cache with window=9"),
    (read("snapkv(kernel=4)"), ValueError, "kernel=4 of the cache; expected an odd number"),
    (read("snapkv(pooling=sum)"), ValueError, "pooling='sum'; expected 'mean' or 'max'"),
    (read("h2o(budget=4, recent=5)"), ValueError, "budget=4 of the cache with recent=5"),
    (read("keyformer(tau=0.0)"), ValueError, "tau=0.0; expected a number above 0"),
    (read("streaming(budget=4, sinks=4)"), ValueError, "budget=4 of the cache 'streaming' with sinks=4"),
    (read("pyramidkv(beta=0.5)"), ValueError, "beta=0.5 of the cache 'pyramidkv'; expected at least 1"),
    (read("cake(window=1)"), ValueError, "window=1 of the cache 'cake'; a variance takes at least 2"),
    (read("kivi(bits=3)"), TypeError, "bits=3; expected 2, 4 or 8"),
    (
        read("kivi(residual=40)"),
        ValueError,
        "residual=40 of the cache 'kivi'; expected a multiple of group=32",
    ),
    (
        read("headkv"),
        ValueError,
        "importance=None of the cache 'headkv', which needs the importance of every head",
    ),
    (
        read("headkv(importance='none.json')"),
        ValueError,
        "importance='none.json' cannot be read: No such file",
    ),
    (read("headkv(importance='README.md')"), ValueError, "importance='README.md' is no JSON"),
    (read("headkv(importance=[1, 2])"), TypeError, "importance=[1, 2]; expected a list per layer"),
    (
        read("headkv(importance=[[1, -2]])"),
        ValueError,
        "importance[0][1]=-2; expected a number of at least 0",
    ),
    (read("headkv(importance=[[0, 0]])"), ValueError, "importance of the cache 'headkv' is 0 for all heads"),
    (read("headkv(importance=[[1]], beta=0.5)"), ValueError, "beta=0.5 of the cache 'headkv'"),
    (read("duoattention"), ValueError, "gates=None of the cache 'duoattention', which needs a gate per head"),
    (
        read("duoattention(gates=[[2.0]])"),
        ValueError,
        "gates of the cache 'duoattention' hold a number above 1",
    ),
    (read("recycled(stride=0)"), ValueError, "stride=0; expected at least 1"),
    (
        read("squeezed(sparsity=1.5)"),
        ValueError,
        "sparsity=1.5; expected a number of at least 0 and at most 1",
    ),
    (
        read("longheads(budget=10, chunk=4)"),
        ValueError,
        "budget=10 of the cache 'longheads' with chunk=4; expected a multiple of the chunk",
    ),
    (read("lserve"), ValueError, "gates=None of the cache 'lserve', which needs a gate per head"),
    (
        read("lserve(gates=[[0.5]], page=24)"),
        ValueError,
        "budget=4096 of the cache 'lserve' with page=24 and logical=16; expected a multiple of the page",
    ),
    (
        read("infllm(budget=100)"),
        ValueError,
        "budget=100 of the cache 'infllm' with unit=128; expected a mult",
    ),
    (
        read("infllm(unit=2)"),
        ValueError,
        "representatives=4 of the cache 'infllm' with unit=2; expected at most the unit",
    ),
    (
        read("shadowkv(budget=12)"),
        ValueError,
        "budget=12 of the cache 'shadowkv' with chunk=8; expected a mult",
    ),
    (
        continued("shadowkv(budget=8, rank=9)"),
        ValueError,
        "rank=9 of the cache 'shadowkv' is more than the 8 features of the keys of layer 0",
    ),
    (
        continued("longheads(budget=4, chunk=2)", mixer_defaults=dict(heads=2, sink_logits=True)),
        ValueError,
        "sink_logits=True of layer 0 does not fit the cache 'longheads'",
    ),
    (read("gemfilter(kernel=2)"), ValueError, "kernel=2 of the cache; expected an odd number"),
    (
        continued("gemfilter(budget=4, layer=1)"),
        ValueError,
        "layer=1 of the cache 'gemfilter' has no cache of all tokens; expected one of the layers 0",
    ),
    (
        read("cskv(keys=0.0)"),
        ValueError,
        "keys=0.0 of the cache 'cskv' keeps no channel; expected more than 0",
    ),
    (
        continued("cskv", mixer_defaults=dict(heads=2, qk_norm=True)),
        ValueError,
        "qk_norm=True of layer 0 does not fit the cache 'cskv'",
    ),
    (read("taskkv(whole=2.0)"), ValueError, "whole=2.0; expected a number of at least 0 and at most 1"),
    (
        lambda: losses_by_position(
            model()(),
            np.ones((1, 4), np.int32),
            np.ones((1, 4), np.int32),
            cache=read_cache("gemfilter(budget=2)"),
        ),
        ValueError,
        "cache=GemFilter chooses the tokens of prompts that are continued; expected another policy",
    ),
    (read("lean(units=0)"), ValueError, "units=0; expected at least 1"),
    (read("locret"), ValueError, "heads=None of the cache 'locret', whose heads are trained for the model"),
    (read("locret(heads='none.npz')"), ValueError, "heads='none.npz' cannot be read: No such file"),
    (read("locret(heads='README.md')"), ValueError, "heads='README.md' is no npz file of arrays"),
    (read("locret(heads=3)"), TypeError, "heads is a int; expected the path of an npz file"),
    (
        lambda: Locret(heads=Trained([]), budget=4, recent=5),
        ValueError,
        "budget=4 of the cache 'locret' with recent=5; expected at least the recent tokens",
    ),
    (
        continued(Locret(heads=Trained([]), budget=4, recent=2)),
        ValueError,
        "heads of the cache 'locret' has 0 layers; expected 1, the layers 0 of the model",
    ),
    (
        continued(
            Locret(heads=Trained([dict(first=np.ones((8, 3)), second=np.ones((3, 2)))]), budget=4, recent=2)
        ),
        ValueError,
        "heads of the cache 'locret' map 8 features to 2 numbers in layer 0; expected 24 and 2",
    ),
    (
        read("attention_gate"),
        ValueError,
        "gates=None of the cache 'attention_gate', whose gates are trained for the model",
    ),
    (read("attention_gate(gates='none.npz')"), ValueError, "gates='none.npz' cannot be read: No such file"),
    (read("attention_gate(gates='README.md')"), ValueError, "gates='README.md' is no npz file of arrays"),
    (
        continued(AttentionGate(gates=Trained([]), budget=4)),
        ValueError,
        "gates of the cache 'attention_gate' has 0 layers; expected 1, the layers 0 of the model",
    ),
    (
        continued(
            AttentionGate(
                gates=Trained([dict(query=np.ones((8, 1, 2)), output=np.ones((1, 2, 3)))]), budget=4
            )
        ),
        ValueError,
        "gates of the cache 'attention_gate' map 8 features to 3 numbers in layer 0; expected 24 and 2",
    ),
    (read("minference(heads='none.json')"), ValueError, "heads='none.json' cannot be read: No such file"),
    (
        read("minference(heads=[[1]])"),
        TypeError,
        "heads=[[1]]; expected a list per layer of one pattern [name, m, n]",
    ),
    (
        read("minference(heads=[[['shape', 1, 2]]])"),
        ValueError,
        "heads[0][0] has the pattern 'shape'; expected one of a_shape, vertical_slash, block_sparse",
    ),
    (
        read("minference(heads=[[['a_shape', 1, -2]]])"),
        ValueError,
        "heads[0][0] of a_shape=-2; expected at least 0",
    ),
    (
        continued("minference(heads=[])"),
        ValueError,
        "heads of the cache 'minference' has 0 layers; expected 1, the layers 0 of the model",
    ),
    (
        continued("minference(heads=[[['a_shape', 1, 2]]])"),
        ValueError,
        "heads of the cache 'minference' has 1 patterns for layer 0; expected 2, its query heads",
    ),
    (
        continued("minference", mixer_defaults=dict(heads=2, position="t5")),
        ValueError,
        "of layer 0 does not fit the cache 'minference'; expected rope, alibi or none",
    ),
    (
        read("hip(budget=12)"),
        ValueError,
        "budget=12 of the cache 'hip' with block=8; expected a multiple of the block",
    ),
    (
        continued("hip(budget=8)", mixer_defaults=dict(heads=2, position="fire")),
        ValueError,
        "of layer 0 does not fit the cache 'hip'; expected rope, alibi or none",
    ),
    (read("moa"), ValueError, "alphas=None of the cache 'moa', which needs the span of every head"),
    (read("moa(alphas=[[1]])"), ValueError, "betas=None of the cache 'moa', which needs the span of every"),
    (
        read("moa(alphas=[[1]], betas=[['a']])"),
        TypeError,
        "betas[0][0]='a'; expected a number",
    ),
    (
        read("moa(alphas=[[1]], betas=[[0.5, 0.5]])"),
        ValueError,
        "alphas and betas of the cache 'moa' are of different heads; expected one of each per head",
    ),
    (
        read("moa(alphas=[[1]], betas=[[0.5]], least=64)"),
        ValueError,
        "least=64 of the cache 'moa' with sinks=64; expected more than the sinks",
    ),
    (
        continued("moa(alphas=[[1]], betas=[[0.5]])"),
        ValueError,
        "alphas of the cache has 1 heads for layer 0; expected 2, its key/value heads",
    ),
    (read("unlimiformer(budget=0)"), ValueError, "budget=0; expected at least 1"),
    (continued("unlimiformer(budget=9)"), ValueError, "budget=9 of the cache is more than the 8 tokens"),
    (read("sale(threshold=-1.0)"), ValueError, "threshold=-1.0; expected a number of at least 0"),
    (
        read("sale(budget=100)"),
        ValueError,
        "budget=100 of the cache 'sale' with block=32; expected a multiple of the block",
    ),
    (
        read("sale(budget=224)"),
        ValueError,
        "budget=224 of the cache 'sale' with window=128, sinks=32, queries=64 and block=32; expected at least 256",
    ),
    (
        continued("sale", mixer_defaults=dict(heads=2, position="t5")),
        ValueError,
        "of layer 0 does not fit the cache 'sale'; expected rope, alibi or none",
    ),
    (continued("recycled(budget=9)"), ValueError, "budget=9 of the cache is more than the 8 tokens"),
    (continued("snapkv", **LRU), ValueError, "cache=SnapKV has nothing to act on: no layer (lru) holds keys"),
    (
        continued("h2o", **WINDOW),
        ValueError,
        "cache=H2O has nothing to act on: no layer (attention) holds keys",
    ),
    (continued("h2o(budget=9)"), ValueError, "budget=9 of the cache is more than the 8 tokens"),
    (
        continued("h2o(budget=4)", lookup=2),
        ValueError,
        "lookup=2 with cache='h2o(budget=4)': a draft that fails",
    ),
    (
        continued("prepacking", shared=dict(layers=(0,))),
        ValueError,
        "shared blocks (shared.layers=(0,)) do not tell their states apart",
    ),
    (
        continued("prepacking", depth=2, pattern=("attention", "gla")),
        ValueError,
        "cache=Prepacking reads several prompts per row, and layer 1 (gla) does not tell their states apart",
    ),
    (
        continued("kivi(group=3, residual=6)"),
        ValueError,
        "head_dim=4 of layer 0 does not fit the cache 'kivi'",
    ),
    (
        continued("headkv(importance=[[1, 2], [3, 4]], budget=4, window=2)"),
        ValueError,
        "importance of the cache has 2 layers; expected 1, the layers 0 of the model",
    ),
    (
        continued("duoattention(gates=[[0.5]])"),
        ValueError,
        "gates of the cache has 1 heads for layer 0; expected 2, its key/value heads",
    ),
]

COMMANDS = [
    (
        "generate --workdir=FILES/run --prompt=a --cache=snapvk",
        "--cache: unknown cache 'snapvk'; did you mean",
    ),
    (
        "generate --workdir=FILES/run --prompt=a --cache=",
        "cache=''; expected a name with options, each once, such as",
    ),
    (
        "long_context --workdir=FILES/run --positions=8 --cache=headkv",
        "--cache: importance=None of the cache",
    ),
    ("generate --workdir=FILES/run --prompt=a --draft=", "--draft: '' names no file or folder"),
    ("generate --workdir=FILES/run --prompt=a --draft_tokens=0", "'0'; expected an integer of at least 1"),
    (
        "generate --workdir=FILES/run --prompt=a --draft_cache=snapvk",
        "--draft_cache: unknown cache 'snapvk'; did you mean",
    ),
    ("evaluate --workdir=FILES/run --cache=snapvk", "--cache: unknown cache 'snapvk'; did you mean"),
    (
        "cache_study --workdir=FILES/run --out=TMP/out --policies=snapvk",
        "--policies=snapvk: there is no such template; did you mean 'snapkv'?",
    ),
    (
        "cache_study --workdir=FILES/run --out=TMP/out --budgets=2",
        "--budgets=2; expected shares between 0 and 1",
    ),
    (
        "cache_study --workdir=FILES/run --out=TMP/out --tasks=passkeys",
        "--tasks=passkeys; did you mean 'passkey'?",
    ),
    ("cache_study --workdir=FILES/run --out=TMP/out --templates=TMP/none", "No such file or directory"),
    ("cache_study --workdir=TMP/none --out=TMP/out", "holds no run: there is no config.json"),
    ("benchmark steps --cache=full --out=TMP", "--cache has no effect on steps, which takes"),
    ("list cache", "invalid choice: 'cache'"),
]
