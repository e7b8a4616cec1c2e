"""Options of mixers, channel mixers, norms and positions that do not fit, and calls of mixers with wrong arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.channel import CHANNEL_MIXERS
from layers.mixers import MIXERS
from layers.norms import NORMS
from layers.positions.position import read_position
from layers.registry import build


def mixer(name, **options):
    return lambda: MIXERS[name][0](**dict(width=8) | options)


def channel(name, **options):
    return lambda: CHANNEL_MIXERS[name][0](**dict(width=8) | options)


def named(kind, registry, name, **options):
    return lambda: build(kind, registry, name, options, given=dict(width=8), rngs=nnx.Rngs(0))


def small(name="gla", **options):
    """A mixer of width 8."""
    return build("mixer", MIXERS, name, options, given=dict(width=8), rngs=nnx.Rngs(0))


def traced(call):
    """A call that looks at shapes and types alone."""
    return lambda: jax.eval_shape(call)


def ones(*shape, dtype="float32"):
    return jnp.asarray(np.ones(shape, dtype))


def called(*inputs, of="gla", options=None, **keywords):
    return traced(lambda: small(of, **(options or {}))(*inputs, **keywords)[0])


OPTIONS = [
    (mixer("attention", heads=3), ValueError, "heads=3 does not divide width=8"),
    (mixer("attention", heads=0), ValueError, "heads=0; expected"),
    (mixer("attention", heads=4, kv_heads=3), ValueError, "kv_heads=3"),
    (mixer("attention", heads=2, window=0), ValueError, "window=0; expected"),
    (mixer("attention", heads=2, sink_tokens=2), ValueError, "sink_tokens=2 with window=None"),
    (mixer("attention", heads=2, logit_cap=-1.0), ValueError, "logit_cap=-1.0; expected"),
    (mixer("attention", heads=2, sink_distance="far"), ValueError, "sink_distance='far'; expected"),
    (
        mixer("attention", heads=2, sink_distance="cache"),
        ValueError,
        "sink_distance='cache' needs sink_tokens",
    ),
    (
        mixer("attention", heads=2, window=2, sink_tokens=1, sink_distance="window", position="none"),
        ValueError,
        "sink_distance='window' needs sink_tokens",
    ),
    (mixer("attention", heads=8), ValueError, "rotary positions need an even head size, got 1"),
    (
        mixer("attention", heads=2, position="ropee"),
        ValueError,
        "unknown position 'ropee'; did you mean 'rope'?",
    ),
    (mixer("gated_attention", heads=2, gate="values"), ValueError, "gate='values'; expected"),
    (mixer("gated_attention", heads=2, gate_size="row"), ValueError, "gate_size='row'; expected"),
    (
        mixer("gated_attention", heads=2, gate="output", gate_size="headwise"),
        ValueError,
        "use gate_size='elementwise'",
    ),
    (mixer("mla", heads=2, latent=0), ValueError, "latent=0; expected"),
    (mixer("mla", heads=2, rope_dim=-2), ValueError, "rope_dim=-2; expected"),
    (mixer("mla", heads=2, rope_dim=3), ValueError, "rope_dim=3"),
    (mixer("mla", heads=2, position="t5"), ValueError, "latent attention takes 'rope' or 'none'"),
    (mixer("linformer", heads=3, max_length=8), ValueError, "heads=3 does not divide width=8"),
    (mixer("linformer", heads=2, max_length=0), ValueError, "max_length=0; expected"),
    (mixer("linformer", heads=2, max_length=8, sharing="all"), ValueError, "sharing='all'; expected"),
    (mixer("longformer", heads=3), ValueError, "heads=3 does not divide width=8"),
    (mixer("longformer", heads=2, dilated_heads=3), ValueError, "dilated_heads=3; expected at most heads=2"),
    (
        mixer("longt5", heads=2, buckets=6),
        ValueError,
        "buckets=6, max_distance=128; expected a multiple of 4",
    ),
    (mixer("nystromformer", heads=2, taps=4), ValueError, "taps=4; expected an odd number, or 0"),
    (mixer("reformer", heads=2, buckets=3), ValueError, "buckets=3; expected an even number"),
    (mixer("shifted_sparse", heads=2, group=5), ValueError, "group=5; expected an even number"),
    (
        mixer("shifted_sparse", heads=2, group=4, group_sinks=3),
        ValueError,
        "group_sinks=3; expected at most half",
    ),
    (
        mixer("shifted_sparse", heads=4, kv_heads=1),
        ValueError,
        "shifted_heads=2; expected at most heads=4 and a multiple of 4",
    ),
    (mixer("shortformer", heads=2, position="rope"), ValueError, "shortformer has positions of its own"),
    (mixer("shortformer", heads=2, subsequence=0), ValueError, "subsequence=0; expected"),
    (
        mixer("transformer_xl", heads=2, position="alibi"),
        ValueError,
        "transformer_xl has positions of its own",
    ),
    (mixer("transformer_xl", heads=2, max_distance=0), ValueError, "max_distance=0; expected"),
    (mixer("softplus_attention", heads=2, offset=-1.0), ValueError, "offset=-1.0; expected"),
    (mixer("softplus_attention", heads=2, scale=1.0), ValueError, "scale=1.0; softplus_attention has"),
    (mixer("moba", heads=2, window=4), ValueError, "window=4; moba has a pattern of its own, expected None"),
    (mixer("moba", heads=2, position="t5"), ValueError, "moba takes 'rope' or 'none'"),
    (
        mixer("landmark", heads=2, block=1),
        ValueError,
        "block=1; expected at least 2, a token and its landmark",
    ),
    (mixer("core_context", heads=2, group=0), ValueError, "group=0; expected at least 1"),
    (mixer("core_context", heads=2, position="t5"), ValueError, "core_context takes 'rope' or 'none'"),
    (mixer("core_context", heads=2, window=4), ValueError, "window=4; core_context has a pattern of its own"),
    (mixer("power_attention", heads=2, window=4), ValueError, "window=4; expected local_blocks where"),
    (mixer("strided_attention", heads=2, stride=0), ValueError, "stride=0; expected at least 1"),
    (
        mixer("strided_attention", heads=2, causal=False),
        ValueError,
        "causal=False; a pattern of blocks looks back",
    ),
    (mixer("mega", attention="cosine"), ValueError, "attention='cosine'; expected"),
    (mixer("mega", position_bias="alibi"), ValueError, "position_bias='alibi'; expected"),
    (mixer("mega", key_dim=3), ValueError, "key_dim=3 is odd"),
    (mixer("mega", max_length=9), ValueError, "max_length=9 with position_bias='rotary'"),
    (mixer("s5", step_rescale=0), ValueError, "step_rescale=0; expected a number above 0"),
    (mixer("mamba", dt_floor=-1.0), ValueError, "dt_floor=-1.0; expected a number of at least 0"),
    (mixer("mamba2", dt_floor=-1.0), ValueError, "dt_floor=-1.0; expected a number of at least 0"),
    (mixer("s5", state_size=6, blocks=4), ValueError, "state_size=6 cannot be cut into blocks=4"),
    (mixer("s5", discretization="euler"), ValueError, "discretization='euler'; expected"),
    (mixer("s5", c_init="ones"), ValueError, "c_init='ones'; expected"),
    (mixer("s5", dt_min=0.1, dt_max=0.01), ValueError, "dt_min=0.1"),
    (mixer("s4d", init="legt"), ValueError, "init='legt'; expected"),
    (mixer("s4d", state_size=3), ValueError, "state_size=3"),
    (mixer("s4", max_length=0), ValueError, "max_length=0; expected"),
    (mixer("dss", max_length=0), ValueError, "max_length=0; expected"),
    (mixer("dss", max_length=8, kernel="sigmoid"), ValueError, "kernel='sigmoid'; expected"),
    (mixer("h3", head_dim=3), ValueError, "head_dim=3 does not divide width=8"),
    (mixer("h3", state_size=5), ValueError, "state_size=5; expected"),
    (mixer("liquid_s4", degree=1), ValueError, "degree=1; expected"),
    (mixer("liquid_s4", kernel="kk"), ValueError, "kernel='kk'; expected"),
    (mixer("mamba", state_size=0), ValueError, "state_size=0; expected"),
    (mixer("mamba", dt_rank=0), ValueError, "dt_rank=0; expected"),
    (mixer("mamba2", head_dim=3), ValueError, "head_dim=3 does not divide expand * width = 16"),
    (mixer("mamba2", head_dim=4, groups=3), ValueError, "groups=3 does not divide the 4 heads"),
    (mixer("mamba2", head_dim=4, a_min=0.0), ValueError, "a_min=0.0"),
    (mixer("mamba2", head_dim=4, dt_limit=(1.0, 0.5)), ValueError, "dt_limit=(1.0, 0.5); expected"),
    (mixer("lru", state_size=0), ValueError, "state_size=0; expected"),
    (mixer("lru", r_min=0.9, r_max=0.5), ValueError, "r_min=0.9, r_max=0.5; expected"),
    (mixer("lru", max_phase=7.0), ValueError, "max_phase=7.0; expected"),
    (mixer("rg_lru", heads=3), ValueError, "heads=3 does not divide"),
    (mixer("rg_lru", r_min=0.0), ValueError, "r_min=0.0"),
    (mixer("hgrn", state="imaginary"), ValueError, "state='imaginary'; expected"),
    (mixer("hgrn", norm="group_norm"), ValueError, "norm='group_norm'; expected"),
    (mixer("hgrn", layer=2, depth=2), ValueError, "layer=2, depth=2; expected 0 <= layer < depth"),
    (mixer("rwkv4", layer=3, depth=2), ValueError, "layer=3, depth=2; expected 0 <= layer < depth"),
    (mixer("xlstm7b", heads=3), ValueError, "heads=3"),
    (mixer("xlstm7b", heads=2, gate_cap=0.0), ValueError, "gate_cap=0.0; expected"),
    (mixer("rwkv_channel", version=5), TypeError, "version=5; expected"),
    (mixer("rwkv_channel", layer=2, depth=2), ValueError, "layer=2, depth=2; expected 0 <= layer < depth"),
    (mixer("lstm", state_size=0), ValueError, "state_size=0; expected"),
    (mixer("hyena", order=1), ValueError, "order=1; expected"),
    (mixer("hyena", filter_features=4), ValueError, "filter_features=4; expected"),
    (mixer("hyena", partial=1025), ValueError, "partial=1025; expected 1 to 1024"),
    (mixer("hyena", frequencies=1026), ValueError, "frequencies=1026; expected 1 to 1025"),
    (mixer("sgconv", max_length=0), ValueError, "max_length=0"),
    (mixer("sgconv", decay_min=2.0, decay_max=1.0), ValueError, "decay_min=2.0, decay_max=1.0; expected"),
    (mixer("lightweight_conv", heads=3), ValueError, "heads=3 does not divide width=8"),
    (mixer("dynamic_conv", heads=2, taps=0), ValueError, "taps=0; expected"),
    (mixer("performer", heads=2, features=0), ValueError, "features=0; expected"),
    (mixer("performer", heads=2, epsilon=-1.0), ValueError, "epsilon=-1.0; expected"),
    (mixer("hypermixer", heads=3), ValueError, "heads=3 does not divide width=8"),
    (mixer("hypermixer", heads=2, position="rope"), ValueError, "position='rope'; expected"),
    (mixer("gla", heads=3), ValueError, "heads=3"),
    (mixer("retnet", heads=3), ValueError, "heads=3"),
    (mixer("deltanet", heads=3), ValueError, "heads=3"),
    (mixer("rwkv7", head_dim=3), ValueError, "head_dim=3"),
    (mixer("hgrn2", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("hgrn2", layer=2, depth=2), ValueError, "layer=2, depth=2; expected 0 <= layer < depth"),
    (mixer("rwkv6", head_dim=3), ValueError, "head_dim=3 does not divide width=8"),
    (mixer("rwkv6", head_dim=4, layer=2, depth=2), ValueError, "layer=2, depth=2; expected"),
    (mixer("sse", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("sse_gdn", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("sse_gdn", heads=2, top_k=4), ValueError, "top_k=4; expected fewer than partitions=4"),
    (mixer("sse", heads=2, top_k=4), ValueError, "top_k=4; expected fewer than partitions=4"),
    (mixer("mlstm", heads=3), ValueError, "heads=3 does not divide expand * width = 16"),
    (mixer("mlstm", heads=2, block=5), ValueError, "block=5 does not divide expand * width = 16"),
    (mixer("slstm", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("slstm", layer=2, depth=2), ValueError, "layer=2, depth=2; expected 0 <= layer < depth"),
    (
        mixer("based", heads=3),
        ValueError,
        "heads=3 cannot share 1 x width=8 equally; choose heads that do, or set value_dim",
    ),
    (mixer("gated_deltaproduct", heads=4), ValueError, "heads=4 cannot share 0.75 x width=8 equally"),
    (mixer("gated_deltaproduct", heads=2, householders=0), ValueError, "householders=0; expected"),
    (mixer("ttt_linear", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("ttt_linear", heads=2, head_dim=3), ValueError, "head_dim=3; rotary positions need an even"),
    (mixer("ttt_linear", heads=2, mini_batch=0), ValueError, "mini_batch=0; expected at least 1"),
    (mixer("titans", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("titans", heads=2, chunk=0), ValueError, "chunk=0; expected at least 1"),
    (mixer("atlas", heads=2, window=0), ValueError, "window=0; expected at least 1"),
    (mixer("atlas", heads=2, degree=3), TypeError, "degree=3; expected 1 or 2"),
    (mixer("mesa_net", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("mesa_net", heads=2, steps=0), ValueError, "steps=0; expected at least 1"),
    (mixer("mesa_net", heads=2, least=0.0), ValueError, "least=0.0; expected 0 < least < 1"),
    (mixer("log_linear_mamba2", head_dim=8, levels=31), ValueError, "levels=31; expected 1 to 30"),
    (mixer("comba", heads=2, value_heads=3), ValueError, "value_heads=3 is not a multiple of heads=2"),
    (mixer("gated_deltanet2", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("kda", heads=2, lowest_decay=0.0), ValueError, "lowest_decay=0.0; expected a number below 0"),
    (mixer("forgetting_attention", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("forgetting_attention", heads=4, kv_heads=3), ValueError, "kv_heads=3 does not divide heads=4"),
    (mixer("differential_attention", heads=2, head_dim=3), ValueError, "head_dim=3 is odd"),
    (mixer("differential_attention", heads=2, rope_base=1.0), ValueError, "rope_base=1.0; expected"),
    (mixer("differential_attention", heads=2, layer=2, depth=2), ValueError, "layer=2, depth=2; expected"),
    (
        mixer("nsa", heads=2, top_k=2),
        ValueError,
        "top_k=2; a query sees the first block, its own and the one",
    ),
    (mixer("dsa", heads=2, top_k=0), ValueError, "top_k=0; expected at least 1"),
    (mixer("dsa", heads=2, index_dim=3), ValueError, "index_dim=3; rotary positions need an even number"),
    (mixer("dsa", heads=2, window=4), ValueError, "window=4; dsa has a pattern of its own"),
    (mixer("sparse_mla", top_k=0), ValueError, "top_k=0; expected at least 1"),
    (
        mixer("sparse_mla", index_dim=4, rope_dim=8),
        ValueError,
        "index_dim=4 with rope_dim=8; expected at least",
    ),
    (mixer("sparse_mla", position="t5"), ValueError, "latent attention takes 'rope' or 'none'"),
    (mixer("nsa", heads=2, block=0), ValueError, "block=0; expected at least 1"),
    (mixer("nsa", heads=2, position="t5"), ValueError, "nsa takes 'rope' or 'none'"),
    (mixer("nsa", heads=2, logit_cap=5.0), ValueError, "logit_cap=5.0; nsa has a pattern of its own"),
    (mixer("b2s6", blocks=3), ValueError, "blocks=3 does not divide expand * width = 16"),
    (mixer("b2s6", inner_norm=True), ValueError, "inner_norm=True; b2s6 selects by block"),
    (mixer("path_attention", heads=3), ValueError, "heads=3 cannot share 1 x width=8 equally"),
    (mixer("path_attention", heads=4, kv_heads=3), ValueError, "kv_heads=3 does not divide heads=4"),
    (mixer("path_attention", heads=2, chunk=0), ValueError, "chunk=0; expected at least 1"),
    (named("mixer", MIXERS, "path_attention", heads=2, taps=99), ValueError, "taps=99; expected"),
    (mixer("cross_scan", inner="s5", orders=()), ValueError, "orders=(); expected one or more of row"),
    (
        mixer("cross_scan", inner="s5", orders=("rows",)),
        ValueError,
        "orders=('rows',); expected one or more of row",
    ),
    (mixer("cross_scan", inner="s5", columns=0), ValueError, "columns=0; expected at least 1"),
    (mixer("vmamba", taps=4), ValueError, "taps=4; expected an odd number"),
    (mixer("vmamba", dt_min=0.0), ValueError, "dt_min=0.0"),
    (
        mixer("cross_scan", inner="s5", window=8),
        ValueError,
        "window=8 has no effect with orders=('row', 'column', 'row_reversed', 'column_reversed')",
    ),
    (mixer("vmamba", window=2), ValueError, "window=2 has no effect with orders=('row',"),
    (mixer("msvmamba", window=2), ValueError, "window=2; msvmamba has its own directions"),
    (mixer("msvmamba", orders=("row",)), ValueError, "orders=('row',); msvmamba has its own directions"),
    (mixer("msvmamba", coarse_taps=2), ValueError, "coarse_taps=2; expected an odd number"),
    (mixer("s4nd", state_size=3), ValueError, "state_size=3; expected an even number"),
    (mixer("s4nd", bandlimit=0.0), ValueError, "bandlimit=0.0; expected"),
    (mixer("linoss", discretization="zoh"), ValueError, "discretization='zoh'; expected"),
    (mixer("mamba3", head_dim=5), ValueError, "head_dim=5 does not divide expand * width = 16"),
    (mixer("mamba3", head_dim=8, groups=3), ValueError, "groups=3 does not divide the 2 heads"),
    (mixer("mamba3", head_dim=8, state_size=3), ValueError, "rotated=0.5 of state_size=3; expected a share"),
    (mixer("mamba3", head_dim=8, rotated=1.5), ValueError, "rotated=1.5 of state_size=128; expected a share"),
    (mixer("mamba3", head_dim=8, dt_min=0.0), ValueError, "dt_min=0.0"),
    (
        mixer("parallel", branches={"gla": {}}),
        ValueError,
        "expected the options of two mixers or more by name",
    ),
    (
        mixer("parallel", branches={"gla": {}, "s5": {}}, scales={"s4": 2.0}),
        ValueError,
        "scales={'s4': 2.0} names s4; branches has gla, s5",
    ),
    (
        mixer("parallel", branches={"gla": {}, "s5": {}}, input_scales={"s4": 2.0}),
        ValueError,
        "input_scales={'s4': 2.0} names s4; branches has gla, s5",
    ),
    (mixer("mamba2", head_dim=3, inner=10), ValueError, "head_dim=3 does not divide inner = 10"),
    (mixer("mamba2", head_dim=4, norm="middle"), ValueError, "norm='middle'; expected"),
    (named("mixer", MIXERS, "mamba4"), ValueError, "unknown mixer 'mamba4'; did you mean 'mamba"),
    (named("mixer", MIXERS, "mamba", d_state=16), ValueError, "mixer 'mamba' has no option 'd_state'"),
    (named("mixer", MIXERS, "attention", n_heads=2), ValueError, "did you mean 'heads'?"),
    (named("mixer", MIXERS, "bidirectional", inner="mambaa"), ValueError, "unknown mixer 'mambaa'"),
    (named("mixer", MIXERS, "bidirectional"), ValueError, "mixer 'bidirectional' needs the option inner"),
    (mixer("attention", heads=2, causal="no"), TypeError, "causal='no'; expected True or False"),
    (mixer("attention", heads=2.0), TypeError, "heads=2.0; expected an integer"),
    (mixer("attention", heads=True), TypeError, "heads=True; expected an integer"),
    (mixer("attention", heads=2, head_dim=0), ValueError, "head_dim=0; expected"),
    (mixer("s5", state_size=0), ValueError, "state_size=0; expected"),
    (mixer("lru", r_min="low"), TypeError, "r_min='low'; expected a number"),
]
OTHER_OPTIONS = [
    (
        named("channel mixer", CHANNEL_MIXERS, "mlp", gate_scale=2.0),
        ValueError,
        "gate_scale=2.0 of an mlp, which has no gate",
    ),
    (
        channel("moe", gated=False, gain=1.7),
        ValueError,
        "gain=1.7 with gated=False and activation=None; it is",
    ),
    (
        channel("moe", activation="relu2", clamp=7.0),
        ValueError,
        "clamp=7.0 with gated=True and activation='relu2'",
    ),
    (
        named("channel mixer", CHANNEL_MIXERS, "moe", activation="relu3"),
        ValueError,
        "unknown activation 'relu3'; did you mean 'relu",
    ),
    (channel("product_key", keys=4, top_k=5), ValueError, "top_k=5; expected at most keys=4"),
    (channel("ultra_memory", keys=4, top_k=5), ValueError, "top_k=5; expected at most keys=4"),
    (channel("ultra_memory", keys=5000, shared_table=True), ValueError, "keys=5000 with shared_table=True"),
    (channel("ultra_memory", shared_table=1), TypeError, "shared_table=1; expected"),
    (channel("ultra_memory", parts=3), ValueError, "parts=3 does not divide value_dim=128"),
    (channel("product_key", key_dim=7), ValueError, "key_dim=7; expected an even number"),
    (channel("moe", experts=4, top_k=5), ValueError, "top_k=5; expected 1 to experts=4"),
    (channel("moe", experts=4, top_k=1), ValueError, "top_k=1 with normalize=True"),
    (channel("moe", experts=4, shared=-1), ValueError, "shared=-1; expected"),
    (channel("moe", experts=4, shared_gate=True), ValueError, "shared_gate=True needs shared experts"),
    (channel("moe", experts=4, scores="relu"), ValueError, "scores='relu'; expected"),
    (channel("moe", experts=4, groups=3), ValueError, "groups=3 cannot share experts=4 equally"),
    (channel("moe", experts=4, compute="loop"), ValueError, "compute='loop'; expected"),
    (named("channel mixer", CHANNEL_MIXERS, "relu"), ValueError, "unknown channel mixer 'relu'"),
    (named("channel mixer", CHANNEL_MIXERS, "mlp", hiden=8), ValueError, "did you mean 'hidden'?"),
    (named("norm", NORMS, "rmsnorm"), ValueError, "unknown norm 'rmsnorm'; did you mean 'rms_norm'?"),
    (named("norm", NORMS, "batch_norm", momentun=0.9), ValueError, "did you mean 'momentum'?"),
    (lambda: read_position("sinusoid"), ValueError, "unknown position 'sinusoid'; available: alibi"),
    (lambda: read_position(dict(name="rope", theta=1e4)), ValueError, "has no option 'theta'"),
    (lambda: read_position(dict(name="rope", base=0.5)), ValueError, "base=0.5; expected"),
    (lambda: read_position(dict(name="rope", fraction=1.5)), ValueError, "fraction=1.5; expected"),
    (lambda: read_position(dict(name="rope", scaling="yarnn")), ValueError, "scaling='yarnn'; expected"),
    (lambda: read_position(dict(name="rope", factor=2.0)), ValueError, "factor=2.0 with scaling='none'"),
    (lambda: read_position(dict(name="rope", scaling="truncated")), ValueError, "llama3 and truncated"),
    (lambda: read_position(dict(name="rope", scaling="power")), ValueError, "power needs an exponent"),
    (lambda: read_position(dict(name="rope", power=0.5)), ValueError, "power=0.5 with scaling='none'"),
    (lambda: read_position(dict(name="rope", still=1.0)), ValueError, "still=1.0; expected"),
    (
        lambda: read_position(dict(name="rope", scaling="power", power=0.5, factor=2.0)),
        ValueError,
        "factor=2.0 with scaling='power'",
    ),
    (
        lambda: read_position(dict(name="rope", scaling="yarn")),
        ValueError,
        "yarn needs the length trained on",
    ),
    (lambda: read_position("clex"), ValueError, "needs the option length"),
    (lambda: read_position(dict(name="clex", length=0)), ValueError, "length=0; expected at least 1"),
    (lambda: read_position(dict(name="clex", length=8, base=1.0)), ValueError, "base=1.0; expected"),
    (lambda: read_position(dict(name="clex", length=8, activation="relu")), ValueError, "activation='relu'"),
    (
        mixer("attention", heads=4, position=dict(name="clex", length=8)),
        ValueError,
        "head_dim=2: position 'clex' needs an even head size of at least 4, got 2",
    ),
    (lambda: read_position(dict(name="t5", buckets=6)), ValueError, "buckets=6; expected"),
    (
        lambda: read_position(dict(name="t5", buckets=32, max_distance=16)),
        ValueError,
        "max_distance=16; expected",
    ),
]
CALLS = [
    (
        called(ones(2, 5, 7), options=dict(heads=2)),
        ValueError,
        "x of GLA has shape (2, 5, 7); expected (b, t, 8)",
    ),
    (called(ones(5, 8), options=dict(heads=2)), ValueError, "x of GLA has shape (5, 8); expected (b, t, 8)"),
    (
        called(ones(2, 5, 8), segment_ids=ones(2, 4, dtype="int32"), options=dict(heads=2)),
        ValueError,
        "segment_ids of GLA has shape (2, 4); expected (2, 5)",
    ),
    (
        called(ones(2, 5, 8), segment_ids=ones(2, 5), options=dict(heads=2)),
        TypeError,
        "segment_ids of GLA has dtype float32; expected an integer type",
    ),
    (called(ones(2, 5, 8), 3, options=dict(heads=2)), TypeError, "state of GLA is a int"),
    (called(ones(2, 5, 8), ones(2, 8), options=dict(heads=2)), TypeError, "expected what init_state returns"),
    (
        traced(lambda: small(heads=2)(ones(2, 5, 8), small("lstm").init_state(2))[0]),
        ValueError,
        "state of GLA is that of another mixer",
    ),
    (
        traced(lambda: small(heads=2)(ones(2, 5, 8), small(heads=2).init_state(3))[0]),
        ValueError,
        "for x of 2 rows, as",
    ),
    (traced(lambda: small("fnet").init_state(2)), ValueError, "FNet is not causal here and has no state"),
    (traced(lambda: small("attention", heads=2).init_state(2)), ValueError, "max_length"),
    (
        called(ones(2, 9, 8), of="linformer", options=dict(heads=2, max_length=8)),
        ValueError,
        "x has 9 tokens; Linformer was made for max_length=8",
    ),
]

ROWS = [*OPTIONS, *OTHER_OPTIONS, *CALLS]
