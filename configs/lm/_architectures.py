"""The models of `models.py` at any width and depth: of one mixer, 3:1 with attention, and the hybrids of configs/hybrids.py.

It is no config. `depth` is that of blocks with a channel mixer of a Transformer's size; models whose layers are smaller have more.
"""

HALF_ROPE = dict(name="rope", fraction=0.5)


def mixers(width: int, length: int) -> dict[str, dict]:
    """Returns the models of one mixer, and 3:1 hybrids with attention."""
    heads = width // (64 if width <= 768 else 128)
    wide = width // (128 if width >= 768 else 64)
    options = {
        "attention": dict(heads=heads),
        "mamba": {},
        "mamba2": {},
        "gla": {},
        "gated_deltanet": dict(heads=wide, key_dim=width // wide, value_dim=width // wide),
        "kda": dict(heads=wide, head_dim=width // wide),
        "retnet": dict(heads=wide),
        "lightning_attention": dict(heads=heads),
        "rwkv7": {},
        "hyena": dict(max_length=length),
        "rg_lru": dict(heads=heads),
        "s5": dict(state_size=2 * width),
        "mamba3": {},
        "hgrn2": dict(heads=heads),
        "rwkv6": {},
        "mlstm": dict(heads=max(2, wide // 2)),
        "gated_deltaproduct": dict(heads=wide, key_dim=width // wide, value_dim=width // wide),
        "comba": dict(heads=wide, key_dim=width // wide, value_dim=width // wide),
        "mesa_net": dict(heads=heads),
        "forgetting_attention": dict(heads=heads),
        "differential_attention": dict(heads=heads // 2 or 1),
        "path_attention": dict(heads=heads),
    }
    found = {name: dict(pattern=(name,), mixers={name: given}) for name, given in options.items()}
    for name in ("mamba", "mamba2", "mamba3", "mlstm"):
        found[name]["pattern"] = (f"{name}+none",)
    # Values of RetNet are twice as wide, and its channel mixer is half as wide.
    found["retnet"]["channels"] = {"swiglu": dict(hidden=-(-width * 4 // 3 // 64) * 64)}
    # Gated DeltaProduct has maps to two keys and values per token.
    found["gated_deltaproduct"]["channels"] = {"swiglu": dict(hidden=2 * width)}
    for name in ("gated_deltanet", "kda", "mamba2"):
        given = {name: options[name], "attention": options["attention"]}
        found[f"{name}_3_1"] = dict(pattern=(name,) * 3 + ("attention",), mixers=given)
    return found


def hybrids(width: int, depth: int) -> dict[str, dict]:
    """Returns hybrids of configs/hybrids.py at a width."""
    heads = width // (64 if width <= 768 else 128)
    size = width // heads
    experts = dict(experts=8, top_k=2, hidden=width)
    shared = experts | dict(shared=1)
    by_bias = dict(scores="sigmoid", bias_rate=0.001, balance=0.0, z_loss=0.0)
    lone, local = dict(heads=heads, kv_heads=1), dict(heads=heads, window=1024)
    return {
        "jamba": dict(
            pattern=("mamba", "mamba+moe") * 2 + ("attention", "mamba+moe") + ("mamba", "mamba+moe"),
            mixers={"mamba": dict(inner_norm=True), "attention": lone | dict(position="none")},
            channels={"moe": experts | dict(normalize=False)},
        ),
        "hunyuan_turbos": dict(
            pattern=("attention+none", "mamba2", "mamba2", "mamba2", "mamba2"),
            mixers={"attention": dict(heads=heads)},
            channel="moe",
            channels={"moe": shared},
        ),
        "samba": dict(pattern=("mamba", "attention"), mixers={"attention": local}),
        "griffin": dict(
            pattern=("rg_lru", "rg_lru", "attention"),
            mixers={
                "rg_lru": dict(heads=heads),
                "attention": local | dict(kv_heads=1, position=HALF_ROPE),
            },
            channel="geglu",
            channels={"geglu": dict(hidden=3 * width)},
        ),
        "minimax": dict(
            pattern=("lightning_attention",) * 7 + ("attention",),
            mixers={
                "lightning_attention": dict(heads=heads),
                "attention": lone | dict(position=HALF_ROPE | dict(base=1e7)),
            },
            channel="moe",
            channels={"moe": experts | dict(balance=0.001)},
            norm_position="post",
            residual_scale=(2 * depth) ** 0.25,
        ),
        "kimi_linear": dict(
            pattern=("kda", "kda", "kda", "mla"),
            mixers={
                "kda": dict(heads=heads, head_dim=size),
                "mla": dict(
                    heads=heads,
                    latent=width // 4,
                    head_dim=size,
                    rope_dim=size // 2,
                    value_dim=size,
                    position="none",
                ),
            },
            channel="moe",
            channels={"moe": shared | by_bias | dict(scale=2.446)},
        ),
        "qwen3_next": dict(
            pattern=("gated_deltanet",) * 3 + ("gated_attention",),
            mixers={
                "gated_deltanet": dict(heads=heads, value_heads=2 * heads, key_dim=size, value_dim=size),
                "gated_attention": lone | dict(head_dim=2 * size, position=dict(name="rope", fraction=0.25)),
            },
            channel="moe",
            channels={"moe": shared | dict(shared_gate=True, balance=0.001)},
        ),
        "hybridna": dict(pattern=("mamba2",) * 7 + ("attention",), mixers={"attention": dict(heads=heads)}),
        "masformer": dict(
            pattern=("attention",) + ("local",) * (depth - 1),
            mixers={"attention": dict(heads=heads), "local": local | dict(mixer="attention")},
            channel="mlp",
            norm="layer_norm",
        ),
    }


def later_hybrids(width: int, depth: int) -> dict[str, dict]:
    """Returns the hybrids of configs/hybrids.py that are younger, or have windows and blocks by layer, at a width and depth."""
    heads = width // (64 if width <= 768 else 128)
    size = width // heads
    shared = dict(experts=8, top_k=2, hidden=width, shared=1)
    by_bias = dict(scores="sigmoid", bias_rate=0.001, balance=0.0, z_loss=0.0)
    full, lone = dict(heads=heads), dict(heads=heads, kv_heads=1)
    zamba2 = 2 * depth - depth // 3  # fewer layers, for the parameters of the shared blocks
    third = -(-depth // 3)
    around = (depth - third) // 2, depth - third - (depth - third) // 2

    def in_the_middle(name: str) -> tuple[str, ...]:
        return (name,) * around[0] + ("attention",) * third + (name,) * around[1]

    return {
        "kimi_gated": dict(
            pattern=("kda", "kda", "kda", "mla"),
            mixers={
                "kda": full | dict(head_dim=size, lowest_decay=-5.0, full_gate=True),
                "mla": full
                | dict(latent=width // 4, head_dim=size, rope_dim=size // 2, value_dim=size)
                | dict(position="none", gate=True),
            },
            channel="moe",
            channels={"moe": shared | by_bias | dict(scale=2.446)},
        ),
        "longgen": dict(
            pattern=in_the_middle("local"),
            mixers={
                "attention": full,
                "local": full | dict(mixer="attention", window=1024, sink_tokens=4),
            },
        ),
        "longgen_blocks": dict(
            pattern=in_the_middle("strided"),
            mixers={
                "attention": full,
                "strided": full | dict(mixer="strided_attention", block=64, local_blocks=16, stride=16),
            },
        ),
        "xlstm": dict(
            pattern=("mlstm+none", "slstm+geglu") + ("mlstm+none",) * 6,
            mixers={"mlstm": dict(heads=max(2, heads // 2)), "slstm": dict(heads=max(2, heads // 2))},
            channels={"geglu": dict(hidden=-(-width * 4 // 3 // 64) * 64)},
            norm="layer_norm",
            depth=2 * depth,
        ),
        "lfm2": dict(
            pattern=("conv", "conv", "attention") * 3 + ("conv", "attention") * 3 + ("conv",),
            mixers={
                "conv": dict(mixer="gated_short_conv"),
                "attention": lone | dict(qk_norm=True, position=dict(name="rope", base=1e6)),
            },
        ),
        "falcon_h1": dict(
            pattern=("parallel",),
            mixers={
                "parallel": dict(
                    branches=dict(
                        mamba2=dict(expand=1),
                        attention=lone | dict(position=dict(name="rope", base=1e11)),
                    )
                )
            },
        ),
        "nemotron_h": dict(
            pattern=("mamba2",) * 4 + ("mamba2+none", "attention"),
            mixers={
                "mamba2": dict(groups=max(1, heads // 4)),
                "attention": lone | dict(position="none"),
            },
            channel="mlp",
            channels={"mlp": dict(activation="relu2")},
        ),
        "zamba2": dict(
            pattern=("mamba2+none",),
            depth=zamba2,
            shared=dict(
                layers=tuple(range(5, zamba2, 6)),
                blocks=2,
                mixer=dict(heads=heads, scale=size**-0.5, output_projection=False),
                channel=dict(channel="geglu", hidden=3 * width // 2),
                adapters=("channel/gate+channel/up",),
                rank=width // 32,
            ),
        ),
        "based": dict(
            pattern=("based", "attention"),
            mixers={"based": dict(heads=heads, feature_dim=16), "attention": full | dict(window=64)},
        ),
        "sse_h": dict(pattern=("sse", "sse", "sse", "attention"), mixers={"sse": full, "attention": full}),
    }


def models(width: int, depth: int, length: int) -> dict[str, dict]:
    """Returns the options of every model by its name; `depth` is that of blocks with a channel mixer."""
    found = mixers(width, length) | hybrids(width, depth) | later_hybrids(width, depth)
    for model in found.values():
        alone = all(entry.endswith("+none") for entry in model["pattern"])
        model |= dict(width=width, depth=model.get("depth", depth * (1 + alone)))
    return found
