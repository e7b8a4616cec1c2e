"""Long Range Arena Image: grey CIFAR-10, 1,024 pixels one by one, ten classes.

    python -m experiments.train --config=configs/lra/image.py:mixer=s5 --workdir=runs/image-s5

The recipe of S5 (Smith et al. 2023): 6 layers of width 512, state of 384 in 3 blocks, eigenvalues clipped,
bidirectional, BatchNorm before every layer, 250 epochs of batches of 50. Published test accuracy: 88.00; it is not
measured here. 5,000 of the 50,000 training images are held out for validation. CIFAR-10's binary version is not
downloaded: unpack it here, or give its folder as --config.task.official_dir.

`mixer=attention` is a Transformer of width 512 (4 layers, 8 heads, RoPE, mean pooling); the one published with the
benchmark reads tokens and reaches 42.44.
"""

from ml_collections import ConfigDict

S5 = dict(
    depth=6,
    pattern=("s5",),
    mixers={"s5": dict(state_size=384, blocks=3, bidirectional=True, c_init="lecun_normal", clip_eigs=True)},
    channel="half_glu1",
    residual="joint",
    norm="batch_norm",
    norm_options=dict(momentum=0.95),
    final_norm=False,
    dropout=0.1,
    scan=False,
)
TRANSFORMER = dict(
    depth=4,
    pattern=("attention",),
    mixers={"attention": dict(heads=8, causal=False)},
    channel="mlp",
    norm="layer_norm",
    dropout=0.1,
)
MODELS = {"s5": S5, "attention": TRANSFORMER}


def get_config(arg: str = "mixer=s5") -> ConfigDict:
    options = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    mixer = options.pop("mixer", "s5")
    if options:
        raise ValueError(f"image.py takes mixer=NAME, not {', '.join(options)}")
    if mixer not in MODELS:
        raise ValueError(f"mixer={mixer!r} has no recipe on Image; available: {', '.join(MODELS)}")

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="cifar10", official_dir="cifar-10-batches-bin")
    config.model = dict(kind="classifier", width=512, dtype="float32", **MODELS[mixer])
    config.train = dict(batch_size=50, epochs=250)
    if mixer == "s5":
        # B learns at the rate of the rest and is decayed, and so are biases; eigenvalues and step sizes are neither.
        config.optimizer = dict(
            learning_rate=4.5e-3,
            weight_decay=0.07,
            warmup_epochs=1,
            groups={
                "ssm": dict(learning_rate=1e-3),
                "ssm/b": dict(learning_rate=4.5e-3, weight_decay=0.07),
                "no_decay": dict(weight_decay=0.07),
            },
        )
    else:
        config.optimizer = dict(learning_rate=5e-4, weight_decay=0.1, warmup_epochs=1, clip_norm=1.0)
    return config
