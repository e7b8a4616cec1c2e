"""Sorting numbers and convex hulls by pointer networks, trained on few items and evaluated on more.

    python -m experiments.train --config=configs/synthetic/pointing.py --workdir=runs/sorting-pointers
    python -m experiments.evaluate --workdir=runs/sorting-pointers --split=length_15
    python -m experiments.train --config=configs/synthetic/pointing.py:task=hull --workdir=runs/hull

    task=sorting|hull

reader=NAME is the mixer that reads the source in both directions, or "set" for a map of each item by itself; mixer=NAME that of the decoder;
process=STEPS, glimpse=yes|no, width, learning_rate, steps, lengths=5-10 (of training). reader=set and process=5 is read-process-write.

RESULTS
"""

from ml_collections import ConfigDict

OPTIONS = dict(
    task="sorting",
    reader="lstm",
    mixer="lstm",
    process="0",
    glimpse="no",
    width="64",
    learning_rate="2e-3",
    steps="2000",
    lengths="5-10",
)
TASKS = dict(sorting="sorting_pointers", hull="convex_hull")


def get_config(arg: str = "") -> ConfigDict:
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"pointing.py takes {', '.join(OPTIONS)}, not {', '.join(unknown)}")
    options = OPTIONS | given
    if options["task"] not in TASKS or options["glimpse"] not in ("yes", "no"):
        raise ValueError(
            f"task={options['task']},glimpse={options['glimpse']}; expected task={'|'.join(TASKS)} and glimpse=yes|no"
        )
    config = ConfigDict()
    config.seed = 0
    low, _, high = options["lengths"].partition("-")
    lengths = int(low), int(high or low)
    further = tuple(lengths[1] * part // 2 for part in (2, 3, 4))
    config.task = dict(name=TASKS[options["task"]], lengths=lengths, extrapolate=further, train=50_000)
    reader = options["reader"]
    both = dict(pattern=("both",), mixers={"both": dict(mixer="bidirectional", inner=reader)})
    config.model = dict(
        kind="pointer_network",
        width=int(options["width"]),
        depth=1,
        pattern=(options["mixer"],),
        encoder=None if reader == "set" else both,
        process_steps=int(options["process"]),
        glimpse=options["glimpse"] == "yes",
        channel="swiglu",
    )
    config.data = {}
    config.train = dict(batch_size=128, steps=int(options["steps"]), eval_every=0.5, log_every=50)
    config.optimizer = dict(
        learning_rate=float(options["learning_rate"]), weight_decay=0.01, warmup_steps=100, clip_norm=2.0
    )
    return config
