"""Speech Commands: 16,000 raw samples or 100 frames, 35 words.

    python -m experiments.train --config=configs/speech/commands.py:mixer=s5 --workdir=runs/sc-s5 \
        --config.task.official_dir=speech_commands_v0.02

With features=log_mel a clip is 100 frames of 80 bands, as Whisper reads them.

The archive speech_commands_v0.02.tar.gz is not downloaded; unpack it and give its folder. Any mixer by name; width, depth, learning_rate,
epochs and features. The recipe is ours, with the depth, width, batches and epochs of S5's.

Results: not measured here; the loader is tested on small files in the official layout. `experiments/tasks/speech_commands.py` has published
accuracies.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "standins" / "_recipe.py"))


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("commands.py", arg, depth=6, epochs=40, features="samples")
    task = dict(name="speech_commands", features=options["features"])
    length = 100 if options["features"] == "log_mel" else 16000
    return RECIPE["stand_in"](options, task=task, kind="classifier", length=length, batch_size=16)
