"""Masked residues of the stand-in by three mixers, three seeds each.

python -m experiments.sweep --file=configs/protein/_seeds.py --out=runs/proteins
"""

MIXERS = ("bimamba", "bi_lstm", "attention")
SEEDS = (0, 1, 2)


def get_sweep():
    for mixer in MIXERS:
        for seed in SEEDS:
            yield {
                "config": f"configs/protein/residues.py:mixer={mixer},width=32,length=128,steps=300",
                "seed": seed,
                "task.proteins": 1500,
                "model.dropout": 0.0,
                "train.eval_every": 100.0,
            }
