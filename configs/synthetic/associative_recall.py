"""Associative recall with one query: 20 pairs of 9 keys and values; or other lengths and vocabularies.

    python -m experiments.train --config=configs/synthetic/associative_recall.py:mixer=h3 --workdir=runs/recall-h3
    python -m experiments.train --config=configs/synthetic/associative_recall.py:mixer=hyena,scale=long ...

Any causal mixer; mixer=NAME, width, depth, learning_rate, and scale=small|long: the setting of H3 (Fu et al. 2023,
arXiv:2212.14052), where H3 and attention reach 100; or Hyena's long one of 131072 tokens and 30 symbols.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="h3", width="64", depth="2", learning_rate="2e-3", scale="small")
NEEDS_LENGTH = ("dss", "hyena", "sgconv")  # their kernels are as long as they are told
LONG = 131_072


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"associative_recall.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    mixer, small = options["mixer"], options["scale"] == "small"
    if options["scale"] not in ("small", "long"):
        raise ValueError(f"scale={options['scale']}; expected small or long")

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="associative_recall")
    if small:
        config.train = dict(batch_size=32, epochs=20, log_every=50)
    else:
        config.task.update(vocab_size=30, length=LONG, train=4000)
        config.train = dict(batch_size=8, epochs=200, log_every=50)
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=(mixer,),
        mixers={mixer: dict(max_length=42 if small else LONG + 2)} if mixer in NEEDS_LENGTH else {},
        mixer_defaults=dict(heads=2, causal=True),
        channel="mlp",
        norm="layer_norm",
    )
    config.data = {}
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.1, warmup_epochs=1, clip_norm=1.0
    )
    return config
