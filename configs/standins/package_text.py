"""Excerpts of 2,048 bytes of Python sources: which of eight installed packages are they from?

    python -m experiments.train --config=configs/standins/package_text.py:mixer=s5 --workdir=runs/package-text-s5

A stand-in with the shape of Long Range Arena's Text, which needs no download and says nothing of the accuracy there: 4,800 excerpts
of flax, fontTools, jax, matplotlib, numpy, orbax, scipy and tensorflow_datasets as they are installed, with no file in two splits.
The frequencies of bytes give about 55%, guessing 12.5%. Any mixer by name; width, depth, learning_rate, length and epochs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).with_name("_recipe.py")))


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("package_text.py", arg, length=2048, epochs=20)
    length = options["length"]
    task = dict(name="package_text", length=length)
    return RECIPE["stand_in"](options, task=task, kind="classifier", length=length, batch_size=32)
