"""Frequency and damping of oscillations from 64 noisy values at irregular times: a regression, as S5's pendulum.

    python -m experiments.train --config=configs/synthetic/oscillations.py:mixer=s5 --workdir=runs/oscillations-s5
    python -m experiments.train --config=configs/synthetic/oscillations.py:mixer=s4d,gaps=none --workdir=runs/oscillations-none

With gaps=steps the time between two observations is the length of the step of the state space model, for S5 and S4D; with
gaps=feature it is a second input, and with gaps=none it is not given, for any mixer. mixer, gaps, width, depth, learning_rate and
steps. Test loss of S5 with seed 0 after 1000 steps, 142 s on two cores: 0.040 with steps, 0.065 with the feature, 0.312 with
none; the means of frequency and damping give 1.02.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "standins" / "_recipe.py"))
SIZES = dict(width=32, depth=2, learning_rate=3e-3, steps=1000)


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("oscillations.py", arg, gaps="steps", **SIZES)
    mixer = options["mixer"]

    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="oscillations", gaps=options["gaps"])
    config.model = dict(
        kind="classifier",
        width=options["width"],
        depth=options["depth"],
        pattern=(mixer,),
        mixer_defaults=dict(heads=4, state_size=32, dt_min=0.01, dt_max=1.0),
        channel="half_glu1",
        residual="joint",
        norm="layer_norm",
    )
    config.data = {}
    config.train = dict(batch_size=64, steps=options["steps"], eval_every=1, log_every=50)
    config.optimizer = dict(
        learning_rate=options["learning_rate"], weight_decay=0.01, warmup_steps=50, clip_norm=1.0
    )
    return config
