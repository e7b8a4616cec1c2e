"""Bach's chorales by three mixers, three seeds each.

python -m experiments.sweep --file=configs/music/_seeds.py --out=runs/chorales
"""

MIXERS = ("lru", "attention", "lstm")
SEEDS = (0, 1, 2)


def get_sweep():
    for mixer in MIXERS:
        for seed in SEEDS:
            yield {"config": f"configs/music/chorales.py:mixer={mixer}", "seed": seed}
