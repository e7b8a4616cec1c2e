"""Excerpts of 2,048 bytes of Python sources: which of eight installed packages are they from?

    python -m experiments.train --config=configs/standins/package_text.py:mixer=s5 --workdir=runs/package-text-s5

A stand-in with the shape of Long Range Arena's Text, which needs no download and says nothing of the accuracy there: 4,800 excerpts
of flax, fontTools, jax, matplotlib, numpy, orbax, scipy and tensorflow_datasets as they are installed, with no file in two splits.
The frequencies of bytes give about 55%, guessing 12.5%. Any mixer by name; width, depth, learning_rate, length and epochs. With
molecules=4 the mixers read one vector for 4 bytes, behind a window of 64 and hash embeddings (CANINE, arXiv:2103.06874).
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).with_name("_recipe.py")))


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("package_text.py", arg, length=2048, epochs=20, molecules=0)
    length = options["length"]
    task = dict(name="package_text", length=length)
    config = RECIPE["stand_in"](options, task=task, kind="classifier", length=length, batch_size=32)
    if options["molecules"]:
        local = dict(pattern=("local",), mixers={"local": dict(mixer="attention", window=64)})
        config.model.update(molecules=options["molecules"], characters=local, hashes=8)
    return config
