"""Selective copying: 8 tokens among 120 of noise; or 16 among 4096, as in the paper.

    python -m experiments.train --config=configs/synthetic/selective_copying.py:mixer=mamba --workdir=runs/copying-mamba
    python -m experiments.compare --config=configs/synthetic/selective_copying.py --mixers=mamba,s4d --workdir=runs/copying
    python -m experiments.train --config=configs/synthetic/selective_copying.py:mixer=mamba,scale=paper ...

Any causal mixer; mixer=NAME, width, depth, learning_rate, scale=small|paper. Two layers of width 64 without channel
mixers. Gu and Dao 2024 (arXiv:2312.00752) report 99.8 for Mamba, 18.3 for S4, 57.0 for H3 and 30.1 for Hyena after
400,000 steps of 64 at a constant learning rate of 1e-4; chance is 7.1.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="mamba", width="64", depth="2", learning_rate="", scale="small")
NEEDS_LENGTH = ("dss", "hyena", "sgconv")  # their kernels are as long as they are told

# State spaces and convolutions without an output map: as published, a gated one follows in the same branch.
BARE = ("dss", "liquid_s4", "lru", "s4", "s4d", "s5", "sgconv")


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"selective_copying.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    mixer, small = options["mixer"], options["scale"] == "small"
    if options["scale"] not in ("small", "paper"):
        raise ValueError(f"scale={options['scale']}; expected small or paper")

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="selective_copying")
    if small:
        config.task.update(length=120, tokens=8, train=1_000_000, validation=500, test=1000)
        config.train = dict(batch_size=64, steps=2000, eval_every=0.032, log_every=50)
    else:
        config.train = dict(batch_size=64, steps=400_000, eval_every=0.16, log_every=100)
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(mixer,),
        mixers={mixer: dict(max_length=136 if small else 4128)} if mixer in NEEDS_LENGTH else {},
        mixer_defaults=dict(heads=2, causal=True),
        **(dict(channel="full_glu", residual="joint") if mixer in BARE else dict(channel="none")),
    )
    config.data = {}
    rate = float(options["learning_rate"] or (3e-3 if small else 1e-4))
    config.optimizer = dict(
        learning_rate=rate, warmup_steps=50, clip_norm=1.0, final_learning_rate=0.0 if small else 1.0
    )
    return config
