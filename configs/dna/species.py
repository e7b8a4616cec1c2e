"""From which species a window of DNA is, with any mixer.

    python -m experiments.train --config=configs/dna/species.py:mixer=hyena --workdir=runs/species-hyena
    python -m experiments.train --config=configs/dna/species.py:mixer=mamba2,length=4096 \
        --config.task.files="('human.fa','mouse.fa')" --workdir=runs/human-mouse

Without files the genomes are five that are drawn from a seed, a stand-in whose next base depends on the last three; the test results
print the accuracy of chains of that order beside the model's.

Options: mixer, width, depth, learning_rate, length (bases per window) and epochs.

Results: not measured here yet.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "standins" / "_recipe.py"))


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("species.py", arg, length=1024, epochs=10)
    length = options["length"]
    task = dict(name="species", files=None, length=length)
    return RECIPE["stand_in"](options, task=task, kind="classifier", length=length, batch_size=32)
