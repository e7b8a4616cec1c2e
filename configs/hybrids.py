"""Hybrids: attention in some layers, recurrences in the others, as published but small, on short ListOps.

    python -m experiments.train --config=configs/hybrids.py:mixer=samba --workdir=runs/samba

    jamba           7 Mamba to 1 attention without positions, mixture of experts in every second layer (2403.19887)
    hunyuan_turbos  blocks of attention, Mamba-2, experts (AMF) and of Mamba-2, experts (MF) (2505.15431)
    samba           Mamba and sliding windows alternating (2406.07522)
    griffin         2 recurrent blocks to 1 local multi-query attention (2402.19427)
    minimax         7 lightning attention to 1 softmax attention, experts, DeepNorm (2501.08313)
    kimi_linear     3 KDA to 1 latent attention without positions, experts (2510.26692)
    kimi_gated      the same with decays of at least exp(-5), full gates of KDA and gated latent attention, as in later models
    qwen3_next      3 Gated DeltaNet to 1 gated attention, experts (2505.06708)
    hybridna        7 Mamba-2 to 1 attention (2502.10807)
    masformer       full attention in the lowest layer alone, windows above (2310.12442)
    longgen         full attention in the middle third of the layers, windows and first tokens in the others (2410.01485)
    longgen_blocks  the same with strided blocks in the others
    xlstm           7 mLSTM to 1 sLSTM, which alone has a channel mixer (2405.04517)
    lfm2            10 gated short convolutions to 6 attention (2511.23404)
    falcon_h1       Mamba-2 and attention side by side in every layer (2507.22448)
    nemotron_h      Mamba-2, attention without positions and squared ReLU, most layers by themselves (2504.03624)
    zamba2          Mamba-2, with two shared blocks of attention and gated MLP that every third layer reads in turn (2411.15242)
    based           linear attention with Taylor features and small windows alternating (2402.18668)
    sse_h           3 SSE to 1 attention (2507.16577); the ratio is ours

Other orders of layers, ratios and positions are the papers'; widths, depths, windows and numbers of experts are smaller. All
are causal and pool over time.
"""

from ml_collections import ConfigDict

EXPERTS = dict(experts=8, top_k=2, hidden=64)
SHARED = EXPERTS | dict(shared=1)
# Balanced by a bias instead of losses.
BY_BIAS = dict(scores="sigmoid", bias_rate=0.001, balance=0.0, z_loss=0.0)
HALF_ROPE = dict(name="rope", fraction=0.5)
LATENT = dict(heads=4, latent=32, head_dim=16, rope_dim=8, value_dim=16, position="none")
MAMBA2 = dict(state_size=32, head_dim=16)
# The first layer is dense.
KIMI = dict(
    depth=4,
    pattern=("kda+swiglu", "kda", "kda", "mla"),
    channel="moe",
    channels={"moe": SHARED | BY_BIAS | dict(scale=2.446)},
)

MODELS = {
    "jamba": dict(
        depth=8,
        # Attention is layer 4 of 8 counted from 0; every second layer has experts.
        pattern=("mamba", "mamba+moe") * 2 + ("attention", "mamba+moe") + ("mamba", "mamba+moe"),
        mixers={
            "mamba": dict(inner_norm=True),
            "attention": dict(heads=4, kv_heads=1, position="none"),
        },
        channels={"moe": EXPERTS | dict(normalize=False)},
    ),
    "hunyuan_turbos": dict(
        depth=5,
        pattern=("attention+none", "mamba2", "mamba2", "mamba2", "mamba2"),
        mixers={"attention": dict(heads=4, kv_heads=2), "mamba2": MAMBA2},
        channel="moe",
        channels={"moe": SHARED},
    ),
    "samba": dict(
        depth=4,
        pattern=("mamba", "attention"),
        mixers={"attention": dict(heads=4, window=64)},
    ),
    "griffin": dict(
        depth=6,
        pattern=("rg_lru", "rg_lru", "attention"),
        mixers={
            "rg_lru": dict(heads=4),
            "attention": dict(heads=4, kv_heads=1, window=64, position=HALF_ROPE),
        },
        channel="geglu",
        channels={"geglu": dict(hidden=192)},
    ),
    "minimax": dict(
        depth=8,
        pattern=("lightning_attention",) * 7 + ("attention",),
        mixers={
            "lightning_attention": dict(heads=4),
            "attention": dict(heads=4, kv_heads=1, position=HALF_ROPE | dict(base=1e7)),
        },
        channel="moe",
        channels={"moe": EXPERTS | dict(balance=0.001)},
        norm_position="post",
        residual_scale=(2 * 8) ** 0.25,
    ),
    "kimi_linear": dict(
        **KIMI,
        mixers={"kda": dict(heads=4), "mla": LATENT},
    ),
    "kimi_gated": dict(
        **KIMI,
        mixers={"kda": dict(heads=4, lowest_decay=-5.0, full_gate=True), "mla": LATENT | dict(gate=True)},
    ),
    "qwen3_next": dict(
        depth=4,
        pattern=("gated_deltanet", "gated_deltanet", "gated_deltanet", "gated_attention"),
        mixers={
            "gated_deltanet": dict(heads=2, value_heads=4, key_dim=16, value_dim=16),
            "gated_attention": dict(
                heads=4, kv_heads=1, head_dim=32, position=dict(name="rope", fraction=0.25)
            ),
        },
        channel="moe",
        channels={"moe": SHARED | dict(shared_gate=True, balance=0.001)},
    ),
    "hybridna": dict(
        depth=8,
        pattern=("mamba2",) * 7 + ("attention",),
        mixers={"mamba2": MAMBA2, "attention": dict(heads=4)},
    ),
    "masformer": dict(
        depth=4,
        pattern=("attention", "local", "local", "local"),
        mixers={"attention": dict(heads=4), "local": dict(mixer="attention", heads=4, window=32)},
        channel="mlp",
        norm="layer_norm",
    ),
    "longgen": dict(
        depth=6,
        pattern=("local", "local", "attention", "attention", "local", "local"),
        mixers={
            "attention": dict(heads=4),
            "local": dict(mixer="attention", heads=4, window=32, sink_tokens=4),
        },
    ),
    "longgen_blocks": dict(
        depth=6,
        pattern=("strided", "strided", "attention", "attention", "strided", "strided"),
        mixers={
            "attention": dict(heads=4),
            "strided": dict(mixer="strided_attention", heads=4, block=8, local_blocks=2, stride=4),
        },
    ),
    "xlstm": dict(
        depth=8,
        # The second block is sLSTM.
        pattern=("mlstm+none", "slstm+geglu") + ("mlstm+none",) * 6,
        mixers={"mlstm": dict(heads=4), "slstm": dict(heads=4)},
        channels={"geglu": dict(hidden=88)},
        norm="layer_norm",
    ),
    "lfm2": dict(
        depth=16,
        pattern=("conv", "conv", "attention") * 3 + ("conv", "attention") * 3 + ("conv",),
        mixers={
            "conv": dict(mixer="gated_short_conv"),
            "attention": dict(heads=4, kv_heads=1, qk_norm=True, position=dict(name="rope", base=1e6)),
        },
    ),
    "falcon_h1": dict(
        depth=4,
        pattern=("parallel",),
        mixers={
            "parallel": dict(
                branches=dict(
                    mamba2=MAMBA2,
                    attention=dict(heads=4, kv_heads=1, position=dict(name="rope", base=1e11)),
                )
            )
        },
    ),
    "nemotron_h": dict(
        depth=6,
        # Mixers and channel mixers are layers of their own; attention stands between Mamba-2 and a channel mixer.
        pattern=("mamba2",) * 4 + ("mamba2+none", "attention"),
        mixers={"mamba2": MAMBA2 | dict(groups=4), "attention": dict(heads=4, kv_heads=1, position="none")},
        channel="mlp",
        channels={"mlp": dict(activation="relu2")},
    ),
    "zamba2": dict(
        depth=9,
        pattern=("mamba2",),
        mixers={"mamba2": MAMBA2},
        channel="none",
        # Every use has adapters of its own on the gated MLP.
        shared=dict(
            layers=(2, 5, 8),
            blocks=2,
            # Queries and keys of both halves, scaled as those of one.
            mixer=dict(heads=4, scale=16**-0.5, output_projection=False),
            channel=dict(channel="geglu", hidden=256),
            adapters=("channel/gate+channel/up",),
            rank=8,
        ),
    ),
    "based": dict(
        depth=4,
        pattern=("based", "attention"),
        mixers={"based": dict(heads=4, feature_dim=16), "attention": dict(heads=4, window=64)},
    ),
    "sse_h": dict(
        depth=4,
        pattern=("sse", "sse", "sse", "attention"),
        mixers={"sse": dict(heads=4, partitions=4, top_k=2), "attention": dict(heads=4)},
    ),
}


def get_config(arg: str = "mixer=samba") -> ConfigDict:
    options = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    mixer = options.pop("mixer", "samba")
    if options:
        raise ValueError(f"hybrids.py takes mixer=NAME, not {', '.join(options)}")
    if mixer not in MODELS:
        raise ValueError(f"mixer={mixer!r} is no hybrid here; available: {', '.join(MODELS)}")

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="listops", preset="short")
    config.model = dict(kind="classifier", width=64, **MODELS[mixer])
    config.data = dict(bucket_bounds=(64, 104, 200))
    config.train = dict(batch_size=64, steps=1000, eval_every=0.5, log_every=25)
    config.optimizer = dict(learning_rate=1e-3, weight_decay=0.04, warmup_steps=100, clip_norm=1.0)
    return config
