"""Bytes of Python's standard library: three layers of Mamba-2 and one of attention, on other files than it is tested on.

    python -m experiments.train --config=configs/lm/stdlib.py --workdir=runs/lm-stdlib
    python -m experiments.train --config=configs/lm/stdlib.py:mixer=gated_deltanet --workdir=runs/lm-gated-deltanet
    python -m experiments.train --config=configs/lm/stdlib.py:pattern=rg_lru/attention,length=512 ...

Any causal mixer that needs no option: mixer=NAME, or pattern=NAME/NAME/... from the first layer on; width, depth, length, learning_rate and
steps. The model has 956,168 parameters and takes rows of 256 bytes, in which documents are kept apart. With seed 0 it
reaches 2.15 bits per byte of the test files (1.93 of validation) in 540 seconds of CPU time; the frequencies of bytes alone give 4.6.
Curves and figures: experiments/results/lm_stdlib.
"""

from ml_collections import ConfigDict

MIXERS = {"mamba2": dict(state_size=32, head_dim=32)}  # of others the defaults
OPTIONS = dict(
    mixer="",
    pattern="mamba2/mamba2/mamba2/attention",
    width="128",
    depth="4",
    length="256",
    learning_rate="3e-3",
    steps="360",
)


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"stdlib.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    for name in ("width", "depth", "length", "steps"):
        if not options[name].isdecimal() or not int(options[name]):
            raise ValueError(
                f"{name}={options[name]!r}; expected a number of at least 1, such as {OPTIONS[name]}"
            )
    try:
        rate = float(options["learning_rate"])
    except ValueError:
        raise ValueError(
            f"learning_rate={options['learning_rate']!r}; expected a number such as 3e-3"
        ) from None
    pattern = (options["mixer"],) if options["mixer"] else tuple(options["pattern"].split("/"))

    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="language",
        source="stdlib",
        length=int(options["length"]),
        packing="best_fit",
        validation=200,
        test=400,
    )
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=pattern,
        mixers={name: given for name, given in MIXERS.items() if name in pattern},
        mixer_defaults=dict(heads=4, causal=True),
    )
    config.data = {}
    config.train = dict(batch_size=8, steps=int(options["steps"]), eval_every=0.05, log_every=20)
    config.optimizer = dict(learning_rate=rate, weight_decay=0.1, warmup_steps=20, clip_norm=1.0)
    return config
