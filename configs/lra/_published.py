"""Recipes of state space models and of MEGA for Long Range Arena, as their authors' scripts have them. It is no config.

S5, S4, DSS, Liquid-S4 and MEGA are published; S4D and SGConv take S4's recipe, which their papers follow, and LRU S5's. Where it
differs: DSS lowers its learning rate on a plateau in place of the cosine, and its output map is linear, not gated; ScaleNorm of
MEGA is RMSNorm here, and its classifier has one layer more.
"""

LENGTHS = dict(
    listops=2048, text=4096, retrieval=4000, image=1024, pathfinder=1024, pathx=16384, path256=65536
)
# S5 (Smith et al. 2023): depth, width, state, blocks, batch, epochs, dropout; then learning rate, its factor for all but the
# state space, weight decay.
S5 = dict(
    listops=(
        8,
        128,
        16,
        8,
        50,
        40,
        0.05,
        1e-3,
        3,
        0.04,
    ),  # dropout 0.05 and momentum 0.99 are ours: +0.7 points
    text=(6, 256, 192, 12, 50, 35, 0.1, 1e-3, 4, 0.07),
    retrieval=(6, 128, 256, 16, 32, 20, 0.0, 1e-3, 2, 0.05),
    image=(6, 512, 384, 3, 50, 250, 0.1, 1e-3, 4.5, 0.07),
    pathfinder=(6, 192, 256, 8, 64, 200, 0.05, 9e-4, 5, 0.03),
    pathx=(6, 128, 256, 16, 32, 75, 0.0, 6e-4, 3, 0.06),
)
S5_OPTIONS = dict(
    listops=dict(c_init="lecun_normal"),
    text=dict(c_init="lecun_normal"),
    retrieval=dict(c_init="truncated_normal"),
    image=dict(c_init="lecun_normal", clip_eigs=True),
    pathfinder=dict(c_init="truncated_normal"),
    pathx=dict(c_init="complex_normal", dt_min=1e-4),
)
S5_MOMENTUM = dict(listops=0.99, text=0.95, retrieval=0.95, image=0.95, pathfinder=0.9, pathx=0.9)
WARMUP = dict(warmup_epochs=1)
B_FAST, B_DECAYED, DT_GLOBAL = ("listops", "image"), ("pathx",), ("text", "retrieval")

# S4 (Gu et al. 2022, version 4 of its repository): width, state, norm position, dropout, batch, epochs, learning rate; six layers.
S4 = dict(
    listops=(256, 4, "post", 0.0, 32, 40, 0.01),
    text=(256, 4, "pre", 0.0, 16, 32, 0.01),
    retrieval=(256, 4, "pre", 0.0, 64, 20, 0.01),
    image=(512, 64, "post", 0.1, 50, 200, 0.01),
    pathfinder=(256, 64, "pre", 0.0, 64, 200, 0.004),
    pathx=(256, 64, "pre", 0.0, 16, 50, 0.001),
)
# DSS (Gupta et al. 2022): depth, width, norm position, dropout, batch, epochs, learning rate, that of step sizes, weight decay.
DSS = dict(
    listops=(6, 128, "post", 0.0, 50, 50, 0.01, 0.02, 0.01),
    text=(4, 128, "pre", 0.0, 50, 40, 0.01, 0.02, 0.0),
    retrieval=(6, 256, "pre", 0.0, 64, 25, 0.002, 0.001, 0.0),
    image=(6, 512, "post", 0.2, 50, 200, 0.004, 0.001, 0.01),
    pathfinder=(6, 256, "pre", 0.1, 100, 200, 0.004, 0.001, 0.0),
    pathx=(6, 256, "pre", 0.0, 16, 35, 5e-4, 1e-4, 0.0),
)
# Liquid-S4 (Hasani et al. 2023): depth, width, state, norm, its position, dropout, batch, epochs, steps of warm-up, learning
# rate, that of A and B, weight decay. A state of 7 is three conjugate pairs, 6 here.
LIQUID_S4 = dict(
    listops=(9, 128, 6, "batch_norm", "pre", 0.01, 12, 40, 1000, 0.002, 9e-4, 0.03),
    text=(4, 128, 6, "batch_norm", "pre", 0.1, 8, 50, 1000, 0.003, 9e-4, 0.01),
    retrieval=(6, 256, 64, "batch_norm", "pre", 0.2, 16, 20, 2500, 0.005, 1e-3, 0.05),
    image=(6, 512, 512, "layer_norm", "post", 0.1, 50, 200, 1000, 0.01, 1e-3, 0.03),
    pathfinder=(6, 256, 64, "batch_norm", "pre", 0.0, 4, 200, 2500, 0.004, 1e-3, 0.03),
    pathx=(6, 320, 64, "batch_norm", "pre", 0.0, 8, 60, 10_000, 0.001, 5e-4, 0.05),
)
# MEGA (Ma et al. 2023): depth, width, values, keys, norm, its position, attention, dropout, batch, steps, warm-up, learning rate,
# weight decay, chunk of MEGA-chunk.
MEGA = dict(
    listops=(6, 80, 160, 64, "layer_norm", "post", "softmax", 0.1, 64, 90_000, 3000, 0.001, 0.01, 128),
    text=(4, 128, 256, 64, "rms_norm", "post", "softmax", 0.1, 50, 25_000, 10_000, 0.004, 0.01, 128),
    retrieval=(6, 128, 256, 64, "rms_norm", "post", "softmax", 0.1, 64, 91_960, 10_000, 0.003, 0.04, 128),
    image=(8, 160, 320, 96, "batch_norm", "pre", "laplace", 0.0, 50, 180_000, 9000, 0.01, 0.02, 128),
    pathfinder=(6, 128, 256, 64, "batch_norm", "pre", "laplace", 0.0, 128, 250_000, 50_000, 0.01, 0.01, 128),
    pathx=(4, 64, 128, 32, "batch_norm", "pre", "laplace", 0.0, 128, 125_000, 25_000, 0.01, 0.01, 4096),
)
JOINT = dict(residual="joint", norm="batch_norm", norm_options=dict(momentum=0.9), scan=False)


def s5(task: str) -> dict:
    depth, width, state, blocks, batch, epochs, dropout, rate, factor, decay = S5[task]
    lru = dict(learning_rate=rate * factor, weight_decay=decay)
    groups = {} if task == "listops" else {"ssm": dict(learning_rate=rate)}
    if task in B_FAST:
        groups["ssm/b"] = lru
    if task in B_DECAYED:
        groups["ssm/b"] = dict(weight_decay=decay)  # at the rate of the other state space parameters
    if task in DT_GLOBAL:
        groups["ssm/dt"] = lru
    model = dict(
        depth=depth,
        width=width,
        mixers={
            "s5": dict(state_size=state, blocks=blocks, bidirectional=True, **S5_OPTIONS[task]),
        },
        channel="half_glu2" if task in ("listops", "text") else "half_glu1",
        final_norm=False,
        dropout=dropout,
        **JOINT | dict(norm_options=dict(momentum=S5_MOMENTUM[task])),
        **(dict(embedding_stddev=0.25) if task == "listops" else {}),
    )
    warmup = dict(warmup_epochs=0 if task == "text" else 1)
    optimizer = lru | warmup | dict(groups=groups | {"no_decay": dict(weight_decay=decay)})
    return dict(model=model, train=dict(batch_size=batch, epochs=epochs), optimizer=optimizer)


def lru(task: str) -> dict:
    recipe = s5(task)
    phase = 0.314 if task in ("pathfinder", "pathx") else 6.283
    ring = dict(state_size=256, r_min=0.9, r_max=0.999, max_phase=phase)
    recipe["model"]["mixers"] = {"lru": dict(mixer="bidirectional", inner="lru", options=ring)}
    recipe["optimizer"]["groups"].pop("ssm/dt", None)
    return recipe


def s4(task: str, length: int, mixer: str) -> dict:
    width, state, position, dropout, batch, epochs, rate = S4[task]
    sizes = dict(max_length=length) if mixer == "sgconv" else dict(state_size=state)
    smallest = dict(dt_min=1e-4) if task == "pathx" and mixer != "sgconv" else {}
    groups = {"ssm": dict(learning_rate=1e-3)}
    if task in ("listops", "text", "retrieval") and mixer != "sgconv":
        groups["ssm/dt"] = dict(learning_rate=rate)
    model = dict(
        depth=6,
        width=width,
        mixers={mixer: dict(bidirectional=True, **sizes, **smallest)},
        channel="full_glu",
        norm_position=position,
        final_norm=position == "pre",
        dropout=dropout,
        **JOINT,
    )
    optimizer = dict(learning_rate=rate, weight_decay=0.05, warmup_epochs=epochs / 10, groups=groups)
    return dict(model=model, train=dict(batch_size=batch, epochs=epochs), optimizer=optimizer)


def dss(task: str, length: int) -> dict:
    depth, width, position, dropout, batch, epochs, rate, steps_rate, decay = DSS[task]
    range_ = dict(dt_min=1e-4, dt_max=1e-2) if task == "pathx" else {}
    model = dict(
        depth=depth,
        width=width,
        mixers={"dss": dict(state_size=64, max_length=length, **range_)},
        channel="half_glu1",
        norm_position=position,
        final_norm=position == "pre",
        dropout=dropout,
        **JOINT,
    )
    groups = {"ssm": dict(learning_rate=1e-3), "ssm/dt": dict(learning_rate=steps_rate)}
    optimizer = dict(learning_rate=rate, weight_decay=decay, groups=groups) | WARMUP
    return dict(model=model, train=dict(batch_size=batch, epochs=epochs), optimizer=optimizer)


def liquid_s4(task: str) -> dict:
    depth, width, state, norm, position, dropout, batch, epochs, warmup, rate, slow, decay = LIQUID_S4[task]
    range_ = dict(dt_min=1e-4) if task == "pathx" else {}
    if task in ("listops", "text", "image"):
        range_ = dict(dt_min=2e-3, dt_max=0.2)
    model = dict(
        depth=depth,
        width=width,
        mixers={"liquid_s4": dict(state_size=state, systems=width, **range_)},
        channel="full_glu",
        norm_position=position,
        final_norm=position == "pre",
        dropout=dropout,
        **JOINT | dict(norm=norm, norm_options=JOINT["norm_options"] if norm == "batch_norm" else {}),
    )
    groups = {"ssm": dict(learning_rate=slow)}
    if task not in ("pathfinder", "pathx"):
        groups["ssm/dt"] = dict(learning_rate=rate)
    optimizer = dict(learning_rate=rate, weight_decay=decay, warmup_steps=warmup, groups=groups)
    return dict(model=model, train=dict(batch_size=batch, epochs=epochs), optimizer=optimizer)


def mega(task: str, length: int, chunked: bool) -> dict:
    depth, width, values, keys, norm, position, weights, dropout, batch, steps, warmup, rate, decay, chunk = (
        MEGA[task]
    )
    reach = dict(chunk=chunk) if chunked else dict(max_length=length)
    options = dict(
        key_dim=keys, value_dim=values, attention=weights, position_bias="simple", bidirectional=True
    )
    name = "mega_chunk" if chunked else "mega"
    model = dict(
        depth=depth,
        width=width,
        mixers={name: dict(mixer="mega", **options, **reach)},
        channel="mlp",
        channels={"mlp": dict(hidden=values, activation="silu")},
        norm=norm,
        norm_position=position,
        final_norm=position == "pre",
        dropout=dropout,
    )
    linear = dict(schedule="wsd", decay_fraction=1 - warmup / steps, warmup_steps=warmup)
    optimizer = dict(learning_rate=rate, weight_decay=decay, clip_norm=1.0, b2=0.98, **linear)
    return dict(model=model, train=dict(batch_size=batch, steps=steps), optimizer=optimizer)


# Each takes a task and its length.
MIXERS = dict(
    s5=lambda task, _: s5(task),
    lru=lambda task, _: lru(task),
    s4=lambda *task: s4(*task, mixer="s4"),
    s4d=lambda *task: s4(*task, mixer="s4d"),
    sgconv=lambda *task: s4(*task, mixer="sgconv"),
    dss=dss,
    liquid_s4=lambda task, _: liquid_s4(task),
    mega=lambda *task: mega(*task, chunked=False),
    mega_chunk=lambda *task: mega(*task, chunked=True),
)
