"""Long-horizon forecasting by Informer's protocol, with any mixer.

    python -m experiments.train --config=configs/forecasting/ett.py:mixer=s4d --workdir=runs/series-s4d
    python -m experiments.train --config=configs/forecasting/ett.py:mixer=s4d,horizon=168 --workdir=runs/etth1-s4d \
        --config.task.file=ETTh1.csv

Without a file the series is a stand-in that is drawn from a seed, an hourly one with periods of a day and a week. The test results
print the losses of repeating the last step and of a linear map beside that of the model.

Options: mixer, values (all, one or all_to_one), length (96 steps), horizon (24; Informer's are 24, 48, 168, 336 and 720 hours), width,
depth, learning_rate and steps. The model reads all values of a step as one vector and forecasts all steps at once from its last output.
The loss is the mean squared error of scaled values.

Results: not measured here yet.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "standins" / "_recipe.py"))
SIZES = dict(width=64, depth=2, learning_rate=1e-3, steps=1000)
WINDOWS = dict(values="all", length=96, horizon=24)


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("ett.py", arg, mixer="s4d", **SIZES, **WINDOWS)

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="forecasting", **{name: options[name] for name in WINDOWS})
    config.model = dict(
        kind="classifier",
        width=options["width"],
        depth=options["depth"],
        pattern=(options["mixer"],),
        mixers={"mega": dict(max_length=None)} if options["mixer"] == "mega" else {},
        mixer_defaults=dict(heads=4, state_size=32, max_length=options["length"]),
        channel="half_glu1",
        residual="joint",
        norm="layer_norm",
        pooling="last",
    )
    config.data = {}
    config.train = dict(batch_size=32, steps=options["steps"], eval_every=1, log_every=50)
    config.optimizer = dict(
        learning_rate=options["learning_rate"], weight_decay=0.01, warmup_steps=50, clip_norm=1.0
    )
    return config
