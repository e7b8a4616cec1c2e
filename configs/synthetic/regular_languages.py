"""In-context learning of regular languages: words of an automaton of 4 letters; or of up to 18, as in the paper.

    python -m experiments.train --config=configs/synthetic/regular_languages.py:mixer=gla --workdir=runs/languages-gla
    python -m experiments.compare --config=configs/synthetic/regular_languages.py --mixers=gla,attention --workdir=runs/languages

Any causal mixer; mixer=NAME, width, depth, learning_rate, scale=small|paper. Akyürek et al. 2024 (arXiv:2401.12973) train on
5000 automata for up to 200 epochs and look at `dfa_accuracy` and `total_variation` on new ones. The best possible
accuracy of the next letter is that of a predictor that knows the automaton, which the results show as a baseline.
"""

from ml_collections import ConfigDict

OPTIONS = dict(mixer="gla", width="", depth="2", learning_rate="", scale="small")


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"regular_languages.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    small = options["scale"] == "small"
    if options["scale"] not in ("small", "paper"):
        raise ValueError(f"scale={options['scale']}; expected small or paper")

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="regular_languages")
    config.data = dict(bucket_bounds=(256, 384, 512, 640, 948))
    config.train = dict(batch_size=32, epochs=200, eval_every=5, log_every=50)
    if small:
        config.task.update(letters=4, states=(4, 6), words=(6, 8), word_length=(1, 15))
        config.data = {}
        config.train.update(epochs=10, eval_every=2)
    config.model = dict(
        kind="language_model",
        width=int(options["width"] or (64 if small else 128)),
        depth=int(options["depth"]),
        pattern=(options["mixer"],),
        mixer_defaults=dict(heads=4, causal=True),
        channel="swiglu",
    )
    rate = float(options["learning_rate"] or (3e-3 if small else 5e-4))
    config.optimizer = dict(
        learning_rate=rate, weight_decay=0.1, warmup_epochs=1 if small else 20, clip_norm=1.0
    )
    return config
