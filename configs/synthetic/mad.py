"""MAD: six small tasks, each for one ability that language needs, at the sizes of its paper.

    python -m experiments.train --config=configs/synthetic/mad.py:task=noisy_recall,mixer=gla --workdir=runs/mad-gla
    python -m experiments.compare --config=configs/synthetic/mad.py:task=compression --mixers=mamba,hyena --workdir=runs/mad

    task=in_context_recall|noisy_recall|fuzzy_recall|selective_copying|compression|memorization

Any causal mixer; mixer=NAME, width, depth, learning_rate, scale=small|paper: 20 epochs or the 200 of Poli et al. 2024
(arXiv:2403.17844), who take the best of learning rates 1e-4, 5e-4 and 1e-3, with weight decay 0 or 0.1, and average
over harder settings too. Blocks are a mixer and a SwiGLU. Compression goes through an autoencoder.
"""

from ml_collections import ConfigDict

OPTIONS = dict(
    task="in_context_recall", mixer="gla", width="128", depth="2", learning_rate="1e-3", scale="small"
)
TASKS = (
    "in_context_recall", "noisy_recall", "fuzzy_recall", "selective_copying", "compression", "memorization"
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"mad.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    task, small = options["task"], options["scale"] == "small"
    if task not in TASKS or options["scale"] not in ("small", "paper"):
        raise ValueError(
            f"task={task},scale={options['scale']}; expected {', '.join(TASKS)} and small or paper"
        )

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name=f"mad_{task}")
    config.train = dict(batch_size=128, epochs=20 if small else 200, eval_every=5, log_every=50)
    if task == "memorization":  # 2 steps an epoch
        config.train.update(epochs=1000, eval_every=200)
    config.model = dict(
        kind="autoencoder" if task == "compression" else "language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(options["mixer"],),
        mixer_defaults=dict(heads=4, causal=True),
        channel="swiglu",
    )
    config.data = {}
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.1, warmup_steps=100, clip_norm=1.0
    )
    return config
