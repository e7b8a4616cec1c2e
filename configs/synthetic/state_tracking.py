"""State tracking: the product of all elements of a group so far, trained on short words and evaluated on longer ones.

    python -m experiments.train --config=configs/synthetic/state_tracking.py:group=S3,mixer=gated_deltaproduct --workdir=runs/s3
    python -m experiments.evaluate --workdir=runs/s3 --split=length_64

    group=Z2|...|S3|S4|S5|A4|A5|...

Any causal mixer; mixer=NAME, width, depth, learning_rate, moved=NUMBER (the inputs are permutations that move at most as many elements)
and scale=small|paper. Small has words of 1 to 16 elements; paper has 128, and up to 512 in evaluation (Siems et al. 2025,
arXiv:2502.10297). Mixers with an option `negative_eigenvalues` use it. A delta rule of n Householder products per token solves
permutations that move at most n + 1 elements in one layer (arXiv:2502.10297): swaps with one.
"""

from ml_collections import ConfigDict

OPTIONS = dict(
    group="S3",
    moved="",
    mixer="gated_deltaproduct",
    width="64",
    depth="1",
    learning_rate="3e-3",
    scale="small",
)
SCALES = {"small": ((1, 16), (16, 32, 64)), "paper": ((128, 128), (128, 256, 512))}


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"state_tracking.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    scale = options["scale"]
    if scale not in SCALES:
        raise ValueError(f"scale={scale}; expected small or paper")

    config = ConfigDict()
    config.seed = 0
    lengths, extrapolate = SCALES[scale]
    config.task = dict(name="word_problem", group=options["group"], lengths=lengths, extrapolate=extrapolate)
    if options["moved"]:
        config.task.moved = int(options["moved"])
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(options["mixer"],),
        mixer_defaults=dict(heads=4, causal=True, negative_eigenvalues=True),
        channel="swiglu",
    )
    config.data = {}
    steps, batch_size = (2000, 128) if scale == "small" else (20_000, 256)
    config.train = dict(batch_size=batch_size, steps=steps, eval_every=0.64, log_every=50)
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.01, warmup_steps=100, clip_norm=1.0
    )
    return config
