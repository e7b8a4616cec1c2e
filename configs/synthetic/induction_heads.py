"""Induction heads: trained on 64 tokens (or 256, as in the paper), evaluated on 64 to 16384.

    python -m experiments.train --config=configs/synthetic/induction_heads.py:mixer=mamba --workdir=runs/heads-mamba
    python -m experiments.evaluate --workdir=runs/heads-mamba --split=length_4096
    python -m experiments.train --config=configs/synthetic/induction_heads.py:mixer=mamba,scale=paper ...

Any causal mixer; mixer=NAME, width, depth, learning_rate, scale=small|paper. Two layers without channel mixers. Gu and
Dao 2024 (arXiv:2312.00752) report that Mamba, trained on 256 tokens for 204,800 steps of 8, is right up to 2^20, while
all others fail beyond twice the length of training. Chance is 6.3. Hyena, SGConv and DSS see 16384 tokens at most.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="mamba", width="64", depth="2", learning_rate="1e-3", scale="small")
NEEDS_LENGTH = ("dss", "hyena", "sgconv")  # their kernels are as long as they are told
LENGTHS = tuple(2**n for n in range(6, 15))

# State spaces and convolutions without an output map: as published, a gated one follows in the same branch.
BARE = ("dss", "liquid_s4", "lru", "s4", "s4d", "s5", "sgconv")


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"induction_heads.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    mixer, small = options["mixer"], options["scale"] == "small"
    if options["scale"] not in ("small", "paper"):
        raise ValueError(f"scale={options['scale']}; expected small or paper")

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="induction_heads", length=64 if small else 256, extrapolate=LENGTHS)
    if small:
        config.train = dict(batch_size=64, steps=2000, eval_batch_size=8, eval_every=0.032, log_every=50)
    else:
        config.train = dict(batch_size=8, steps=204_800, eval_every=0.16, log_every=100)
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(mixer,),
        mixers={mixer: dict(max_length=LENGTHS[-1])} if mixer in NEEDS_LENGTH else {},
        mixer_defaults=dict(heads=2, causal=True),
        **(dict(channel="full_glu", residual="joint") if mixer in BARE else dict(channel="none")),
    )
    config.data = {}
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]),
        warmup_steps=50,
        clip_norm=1.0,
        final_learning_rate=0.0 if small else 1.0,
    )
    return config
