"""Excerpts of 2,048 bytes of Python sources: which of eight installed packages are they from?

    python -m experiments.train --config=configs/standins/package_text.py:mixer=s5 --workdir=runs/package-text-s5

A stand-in with the shape of Long Range Arena's Text, which needs no download and says nothing of the accuracy there: 4,800 excerpts
of flax, fontTools, jax, matplotlib, numpy, orbax, scipy and tensorflow_datasets as they are installed, with no file in two splits.
The frequencies of bytes give about 55%, guessing 12.5%. Any mixer by name; width, depth, learning_rate, length and epochs.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="s5", width="96", depth="4", learning_rate="3e-3", length="2048", epochs="20")
# State space models and convolutions without an output map: as published, a gated one follows in the same branch.
BARE = ("dss", "liquid_s4", "lru", "s4", "s4d", "s5", "sgconv")


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"package_text.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    mixer = options["mixer"]

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="package_text", length=int(options["length"]))
    body = (
        dict(channel="half_glu1", residual="joint", norm="batch_norm")
        if mixer in BARE
        else dict(channel="mlp", norm="layer_norm")
    )
    config.model = dict(
        kind="classifier",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(mixer,),
        mixers={"mega": dict(max_length=None)} if mixer == "mega" else {},
        mixer_defaults=dict(heads=4, causal=False, bidirectional=True, max_length=int(options["length"])),
        dropout=0.1,
        **body,
    )
    config.data = {}
    config.train = dict(batch_size=32, epochs=int(options["epochs"]))
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.05, warmup_epochs=1, clip_norm=1.0
    )
    return config
