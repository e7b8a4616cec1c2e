"""A small language model of bytes per rule of position, trained on rows of 128 bytes of Python's standard library.

    python -m experiments.train --config=configs/lm/extrapolation.py:rule=alibi --workdir=runs/alibi

rule=none|sinusoidal|rope|alibi|t5|fire|hope|power|truncated|random|clex|shortformer|mamba|mamba2. random has RoPE with positions that are
drawn from sequences up to 16 times as long; clex draws them too. width, depth, length, steps and learning_rate. What each of
them reaches on rows up to 16 times as long, with scalings of RoPE that change evaluation alone, is in experiments/results/extrapolation:

    python -m experiments.sweep --file=configs/lm/_extrapolation.py --out=runs/extrapolation
    python -m experiments.analysis.extrapolation --runs=runs/extrapolation --out=experiments/results/extrapolation
"""

from ml_collections import ConfigDict

FACTOR = 16  # of the longest rows that positions are drawn from, and that frequencies are learned for
OPTIONS = dict(rule="rope", width="64", depth="2", length="128", steps="300", learning_rate="3e-3")


def rules(length: int) -> dict[str, dict]:
    """The fields of the model that each rule sets."""

    def rotary(**options):
        return dict(mixer_defaults=dict(position=dict(name="rope", **options)))

    clex = dict(name="clex", length=length, max_factor=FACTOR, steps=4)
    return {
        "none": dict(mixer_defaults=dict(position="none")),
        "sinusoidal": dict(mixer_defaults=dict(position="none"), absolute_positions="sinusoidal"),
        "rope": rotary(),
        "alibi": dict(mixer_defaults=dict(position="alibi")),
        "t5": dict(mixer_defaults=dict(position="t5")),
        "fire": dict(mixer_defaults=dict(position="fire")),
        "hope": rotary(still=0.25),
        "power": rotary(scaling="power", power=0.5),
        "truncated": rotary(scaling="truncated", length=length),
        "random": rotary() | dict(stretch=FACTOR),
        "clex": dict(mixer_defaults=dict(position=clex), stretch=FACTOR),
        "shortformer": dict(pattern=("shortformer",), mixers=dict(shortformer=dict(subsequence=length // 2))),
        "mamba": dict(pattern=("mamba",)),
        "mamba2": dict(pattern=("mamba2",), mixers=dict(mamba2=dict(state_size=32, head_dim=32))),
    }


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"extrapolation.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    for name in ("width", "depth", "length", "steps"):
        if not options[name].isdecimal() or int(options[name]) < 2:
            raise ValueError(
                f"{name}={options[name]!r}; expected a number of at least 2, such as {OPTIONS[name]}"
            )
    try:
        rate = float(options["learning_rate"])
    except ValueError:
        raise ValueError(
            f"learning_rate={options['learning_rate']!r}; expected a number such as 3e-3"
        ) from None
    length = int(options["length"])
    known = rules(length)
    if options["rule"] not in known:
        raise ValueError(f"rule={options['rule']}; expected {'|'.join(known)}")
    model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=("attention",),
    )
    model |= known[options["rule"]]
    model["mixer_defaults"] = dict(heads=4) | model.get("mixer_defaults", {})

    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="language", source="stdlib", length=length, packing="best_fit", validation=128, test=256
    )
    config.model = model
    config.data = {}
    steps = int(options["steps"])
    config.train = dict(batch_size=8, steps=steps, eval_every=0.5, log_every=50)
    config.optimizer = dict(learning_rate=rate, weight_decay=0.1, warmup_steps=20, clip_norm=1.0)
    return config
