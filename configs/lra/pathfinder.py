"""Long Range Arena Pathfinder: images of 32 x 32 pixels, pixel by pixel; with size=128 Path-X, 16,384 pixels.

    python -m experiments.train --config=configs/lra/pathfinder.py:mixer=s5 --workdir=runs/pathfinder-s5
    python -m experiments.train --config=configs/lra/pathfinder.py:mixer=s5,size=128 --workdir=runs/pathx-s5

The recipe of S5 (Smith et al. 2023). Pathfinder: 6 layers of width 192, state of 256 in 8 blocks, 200 epochs of
batches of 64; published test accuracy: 95.33. Path-X: 6 layers of width 128, state of 256 in 16 blocks, 75 epochs of
batches of 32; published: 98.58. Both are bidirectional with BatchNorm before every layer. The data are generated from a
seed; neither accuracy is measured here.

`mixer=attention` is a Transformer of the same width (4 layers, 8 heads, RoPE, mean pooling); the one published with
the benchmark reaches 71.40, and chance on Path-X.
"""

from ml_collections import ConfigDict

S5 = dict(
    depth=6,
    pattern=("s5",),
    channel="half_glu1",
    residual="joint",
    norm="batch_norm",
    norm_options=dict(momentum=0.9),
    final_norm=False,
    scan=False,
)
STATES = {
    32: dict(state_size=256, blocks=8, bidirectional=True, c_init="truncated_normal"),
    128: dict(state_size=256, blocks=16, bidirectional=True, c_init="complex_normal", dt_min=1e-4),
}
TRANSFORMER = dict(
    depth=4,
    pattern=("attention",),
    mixers={"attention": dict(heads=8, causal=False)},
    channel="mlp",
    norm="layer_norm",
    dropout=0.1,
)
WIDTHS = {32: 192, 128: 128}
TRAINING = {32: dict(batch_size=64, epochs=200), 128: dict(batch_size=32, epochs=75)}
# The state space parameters learn at the rate divided by the factor.
RATES = {32: (9e-4, 5, 0.03), 128: (6e-4, 3, 0.06)}


def get_config(arg: str = "mixer=s5") -> ConfigDict:
    options = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    mixer, given = options.pop("mixer", "s5"), options.pop("size", "32")
    if options:
        raise ValueError(f"pathfinder.py takes mixer=NAME and size=SIDE, not {', '.join(options)}")
    if mixer not in ("s5", "attention"):
        raise ValueError(f"mixer={mixer!r} has no recipe on Pathfinder; available: s5, attention")
    if given not in map(str, WIDTHS):
        raise ValueError(
            f"size={given!r} has no recipe on Pathfinder; available: {', '.join(map(str, WIDTHS))}"
        )
    size = int(given)

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="pathfinder", size=size)
    config.train = dict(TRAINING[size])
    model = dict(kind="classifier", width=WIDTHS[size], dtype="float32")
    if mixer == "s5":
        config.model = model | S5 | dict(mixers={"s5": STATES[size]}, dropout={32: 0.05, 128: 0.0}[size])
        rate, factor, decay = RATES[size]
        groups = {"ssm": dict(learning_rate=rate), "no_decay": dict(weight_decay=decay)}
        if size == 128:
            groups["ssm/b"] = dict(weight_decay=decay)  # at the rate of the other state space parameters
        config.optimizer = dict(
            learning_rate=rate * factor, weight_decay=decay, warmup_epochs=1, groups=groups
        )
    else:
        config.model = model | TRANSFORMER
        config.optimizer = dict(learning_rate=5e-4, weight_decay=0.1, warmup_epochs=1, clip_norm=1.0)
    return config
