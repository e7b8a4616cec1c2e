"""Small images by mixers that know rows and columns: digits of 28 x 28 pixels, or CIFAR-10 in colour.

    python -m experiments.train --config=configs/standins/images.py:mixer=vmamba --workdir=runs/digits-vmamba
    python -m experiments.train --config=configs/standins/images.py:mixer=cross_scan,inner=mamba2,orders=snake+hilbert \
        --workdir=runs/digits-snake
    python -m experiments.train --config=configs/standins/images.py:mixer=s4nd,data=cifar10 --workdir=runs/cifar-s4nd

Mixers: vmamba, msvmamba, s4nd, and cross_scan around the mixer `inner`. `orders` are the scan orders of vmamba and cross_scan, joined
by "+": row, column, snake, hilbert and window, each also with "_reversed" behind its name. Every pixel is a token. The same
digits as a sequence are `smnist.py`, which says what they stand in for; for CIFAR-10 unpack its binary version here, or give
its folder as --config.task.official_dir. The recipe is ours, untuned; no result is claimed. Options: width, depth,
learning_rate and epochs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).with_name("_recipe.py")))
MIXERS = ("vmamba", "msvmamba", "s4nd", "cross_scan")
ORDERED = ("vmamba", "cross_scan")
# Task, and pixels in a row.
DATA = dict(
    digits=(dict(name="mnist"), 28),
    cifar10=(dict(name="cifar10", official_dir="cifar-10-batches-bin", inputs="colour"), 32),
)


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("images.py", arg, mixer="vmamba", data="digits", inner="", orders="", epochs=30)
    mixer, data = options["mixer"], options["data"]
    if mixer not in MIXERS:
        raise ValueError(f"mixer={mixer!r} is not one of {', '.join(MIXERS)}; smnist.py takes any other")
    if data not in DATA:
        raise ValueError(f"data={data!r}; expected {' or '.join(DATA)}")
    task, columns = DATA[data]
    more = dict(columns=columns)
    if mixer == "cross_scan":
        more |= dict(inner=options["inner"] or "mamba")
    elif options["inner"]:
        raise ValueError(f"inner={options['inner']}; only cross_scan takes a mixer")
    if options["orders"]:
        if mixer not in ORDERED:
            raise ValueError(f"orders={options['orders']}; only {' and '.join(ORDERED)} have scan orders")
        more |= dict(orders=tuple(options["orders"].split("+")))
    return RECIPE["stand_in"](options, task=task, kind="classifier", length=columns**2, batch_size=50, **more)
