"""A language model of bytes, trained to find what stands far back in texts of up to 4,096 bytes.

    python -m experiments.data.retrieval_texts --out=data/retrieval.jsonl --length=4096
    python -m experiments.train --config=configs/lm/needles.py:source=data/retrieval.jsonl --workdir=runs/retrieval
    python -m experiments.train --config=configs/lm/needles.py:source=data/retrieval.jsonl,pattern=mamba2/mamba2/mamba2/attention \
        --workdir=runs/retrieval-hybrid
    python -m experiments.cache_study --workdir=runs/retrieval --out=results/caches --length=4096

Results: not measured here yet.

Options: source=FILE of JSON lines, pattern=NAME/NAME/... of causal mixers (attention, or a hybrid), width, depth, length, learning_rate and
steps. By default a Transformer of 12.5M parameters with two key/value heads for eight query heads.
"""

from ml_collections import ConfigDict

OPTIONS = dict(
    source="", pattern="attention", width="384", depth="8", length="4352", learning_rate="1e-3", steps="20000"
)


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"needles.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
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
            f"learning_rate={options['learning_rate']!r}; expected a number such as 1e-3"
        ) from None
    pattern, steps = tuple(options["pattern"].split("/")), int(options["steps"])

    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="language",
        # Without a file the sources of the standard library stand in for texts of retrieval.
        source=options["source"] or "stdlib",
        length=int(options["length"]),
        packing="best_fit",
        validation=64,
        test=64,
    )
    mixers = {"attention": dict(heads=8, kv_heads=2), "mamba2": dict(state_size=64, head_dim=64)}
    config.model = dict(
        kind="language_model",
        width=int(options["width"]),
        depth=int(options["depth"]),
        pattern=pattern,
        mixers={name: mixers[name] for name in dict.fromkeys(pattern) if name in mixers},
    )
    config.data = {}
    config.train = dict(batch_size=16, steps=steps, eval_every=0.5, log_every=50)
    config.optimizer = dict(
        learning_rate=rate, weight_decay=0.1, warmup_steps=min(200, max(1, steps // 10)), clip_norm=1.0
    )
    return config
