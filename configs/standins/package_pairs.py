"""Pairs of excerpts of 1,024 bytes of Python sources: are both from one package?

    python -m experiments.train --config=configs/standins/package_pairs.py:mixer=s5 --workdir=runs/package-pairs-s5

A stand-in with the shape of Long Range Arena's Retrieval, which needs no download and says nothing of the accuracy there: 9,600
pairs of excerpts of different files of eight installed packages, half of them of one package, with no file in two splits.
Guessing gives 50%. Any mixer by name; width, depth, learning_rate, length and epochs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).with_name("_recipe.py")))


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("package_pairs.py", arg, length=1024, epochs=20)
    length = options["length"]
    task = dict(name="package_pairs", length=length)
    return RECIPE["stand_in"](options, task=task, kind="dual_encoder", length=length, batch_size=32)
