"""Multi-query associative recall: 8 pairs in 64 tokens of a vocabulary of 256; or at the sizes of its paper.

    python -m experiments.train --config=configs/synthetic/mqar.py:mixer=deltanet --workdir=runs/mqar-deltanet
    python -m experiments.compare --config=configs/synthetic/mqar.py --mixers=deltanet,s4d --workdir=runs/mqar
    python -m experiments.train --config=configs/synthetic/mqar.py:mixer=hyena,scale=paper,length=512,width=128 ...

Any causal mixer; mixer=NAME, width, depth, learning_rate, scale=small|paper and, with the last, length=64|128|256|512
with 4, 8, 16 and 64 pairs: the settings of Figure 2 of Arora et al. 2024 (arXiv:2312.04927), where every mixer has its
own best learning rate among 1e-4, 4.6e-4, 2.2e-3 and 1e-2. Two layers without channel mixers, as there. DeltaNet with
seed 0 answers all queries of the small setting after about 300 steps, two minutes on two CPU cores.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="deltanet", width="64", depth="2", learning_rate="3e-3", scale="small", length="64")
PAPER = {64: (4, 512), 128: (8, 512), 256: (16, 256), 512: (64, 128)}  # pairs, batch size

# State spaces and convolutions without an output map: as published, a gated one follows in the same branch.
BARE = ("dss", "liquid_s4", "lru", "s4", "s4d", "s5", "sgconv")


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"mqar.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    mixer, length, small = options["mixer"], int(options["length"]), options["scale"] == "small"
    if options["scale"] not in ("small", "paper") or length not in ([64] if small else PAPER):
        raise ValueError(
            f"scale={options['scale']},length={length}; expected paper with one of {list(PAPER)}"
        )

    config = ConfigDict()
    config.seed = 0
    if small:
        config.task = dict(
            name="mqar", vocab_size=256, length=64, pairs=8, train=20_000, validation=500, test=1000
        )
        config.train = dict(batch_size=64, steps=600, eval_every=1, log_every=25)
    else:
        pairs, batch_size = PAPER[length]
        config.task = dict(name="mqar", vocab_size=8192, length=length, pairs=pairs)
        config.train = dict(batch_size=batch_size, epochs=64)
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(mixer,),
        mixer_defaults=dict(heads=1, causal=True),
        **(dict(channel="full_glu", residual="joint") if mixer in BARE else dict(channel="none")),
    )
    config.data = {}
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.1, warmup_steps=50, clip_norm=1.0
    )
    return config
