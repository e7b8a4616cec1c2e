"""Long Range Arena Pathfinder: images of 32 x 32 pixels, pixel by pixel; with size=128 Path-X, 16,384 pixels.

    python -m experiments.train --config=configs/lra/pathfinder.py:mixer=s5 --workdir=runs/pathfinder-s5
    python -m experiments.train --config=configs/lra/pathfinder.py:mixer=s5,size=128 --workdir=runs/pathx-s5

The images are generated from a seed, or read with --config.task.official_dir. size=256 is Path-256, 65,536 pixels, with the
recipe of Path-X, for which nothing is published.

Mixers: s5, s4, s4d, dss, liquid_s4, lru, sgconv, mega, mega_chunk, mamba, b2s6, bimamba, mamba2, gated_deltanet, hyena, attention,
local_attention, linformer, performer, linear_attention, fnet, wersa, and the sparse and low-rank attention of `SPARSE` in
`_recipes.py`; with protocol=lra the five of these that the benchmark was published with. What is published and what is ours is
said in `_recipes.py`.

Published test accuracy on Pathfinder and Path-X, protocol "s4": MEGA 96.01 and 97.98, SGConv 95.46 and 97.83, S5 95.33 and 98.58, LRU
95.1 and 94.2, Liquid-S4 94.80 and 96.66, MEGA-chunk 94.41 and 93.81, S4 94.20 and 96.35, S4D 93.06 and 91.95, Mamba-2 75.45 and 69.07,
Mamba 69.26 and 67.32; protocol "lra": Performer 77.05, Linformer 76.34, linear attention 75.30, Transformer 71.40, local attention
66.63, all at chance on Path-X. None of these is measured here. S5 trains for 200 epochs of batches of 64, and on Path-X for 75 of 32.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPES = runpy.run_path(str(pathlib.Path(__file__).with_name("_recipes.py")))
SIZES = {"32": "pathfinder", "128": "pathx", "256": "path256"}
INPUTS = {"s4": dict(), "lra": dict(inputs="tokens")}


def get_config(arg: str = "mixer=s5") -> ConfigDict:
    options = RECIPES["parse"]("pathfinder.py", arg, size="32")
    if (size := options.pop("size")) not in SIZES:
        raise ValueError(f"size={size!r} has no recipe on Pathfinder; available: {', '.join(SIZES)}")
    task = dict(name="pathfinder", size=int(size), **INPUTS[options["protocol"]])
    return RECIPES["config"](SIZES[size], **options, task=task, data={})
