"""Attention on rows of 64 bytes, on pieces of stretches of 256, and on rows of 256; as many bytes in each step, three seeds.

python -m experiments.sweep --file=configs/lm/_pieces.py --out=runs/pieces
"""

JOINED = {"task.packing": "concatenate", "task.reset": False}
ROWS = {
    "rows of 64": {"task.length": 64, "train.batch_size": 32},
    "pieces of 256": {"task.length": 64, "train.batch_size": 32, "task.extent": 256, "task.pieces": 4},
    "rows of 256": {"task.length": 256, "train.batch_size": 8},
}
SEEDS = (0, 1, 2)


def get_sweep():
    for fields in ROWS.values():
        for seed in SEEDS:
            yield {
                "config": "configs/lm/stdlib.py:mixer=attention,width=64,depth=2,learning_rate=4e-3,steps=300",
                "seed": seed,
                "train.eval_every": 100.0,
                "task.validation": 64,
                "task.test": 64,
                **JOINED,
                **fields,
            }
