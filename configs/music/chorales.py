"""Bach's chorales, the notes of the next frame or the next event, with any causal mixer.

    python -m experiments.train --config=configs/music/chorales.py:mixer=lru --workdir=runs/chorales-lru
    python -m experiments.train --config=configs/music/chorales.py:mixer=mamba2,as=events --workdir=runs/chorale-events-mamba2
    python -m experiments.train --config=configs/music/chorales.py:mixer=lru --config.task.official_file=JSB_Chorales.mat \
        --workdir=runs/jsb-lru

Without a file the pieces are the chorales of the package music21, which must be installed, with splits of its own.

Options: mixer, as (rolls or events), width, depth, learning_rate and steps. Rolls are frames of 88 notes for a regressor, and the loss is
in nats per frame; events are tokens for a language model, notes and ends of frames, and the loss is in nats per event.

Results: experiments/results/chorales. Nats per frame of the test split: LSTM 9.14, LRU 9.37 and attention 9.57.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "standins" / "_recipe.py"))
SIZES = dict(width=64, depth=2, learning_rate=3e-3, steps=300)
TASKS = {"rolls": ("chorales", "regressor"), "events": ("chorale_events", "language_model")}


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("chorales.py", arg, mixer="lru", **{"as": "rolls"}, **SIZES)
    if options["as"] not in TASKS:
        raise ValueError(f"as={options['as']!r}; expected rolls or events")
    task, kind = TASKS[options["as"]]

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name=task)
    config.model = dict(
        kind=kind,
        width=options["width"],
        depth=options["depth"],
        pattern=(options["mixer"],),
        mixers={"mega": dict(max_length=None)} if options["mixer"] == "mega" else {},
        mixer_defaults=dict(heads=4, causal=True, max_length=1024),
        channel="mlp",
        dropout=0.2,
    )
    config.data = {}
    config.train = dict(batch_size=16, steps=options["steps"], eval_every=2.0, log_every=50)
    config.optimizer = dict(
        learning_rate=options["learning_rate"], weight_decay=0.05, warmup_steps=50, clip_norm=1.0
    )
    return config
