"""One model per rule of position and seed, for experiments/results/extrapolation.

python -m experiments.sweep --file=configs/lm/_extrapolation.py --out=runs/extrapolation
"""

RULES = (
    "none",
    "sinusoidal",
    "rope",
    "alibi",
    "fire",
    "hope",
    "random",
    "clex",
    "shortformer",
    "mamba2",
)
SEEDS = (0, 1, 2)


def get_sweep():
    for seed in SEEDS:
        for rule in RULES:
            yield {"config": f"configs/lm/extrapolation.py:rule={rule}", "seed": seed}
