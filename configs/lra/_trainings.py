"""Trainings of Long Range Arena that need no download, by the published recipes: ListOps, Pathfinder, and sequential MNIST beside them.

    python -m experiments.sweep --file=configs/lra/_trainings.py --out=runs/lra --devices 0 1
    python -m experiments.report --out=runs/lra-report runs/lra/*

S5 has three seeds on ListOps, the others one. One run is trained by its number: --index=0.
"""

RUNS = (
    *(("listops", "s5", seed) for seed in (0, 1, 2)),
    *(("listops", mixer, 0) for mixer in ("mega", "s4d", "lru", "bimamba", "attention")),
    *(("pathfinder", mixer, 0) for mixer in ("s5", "lru")),
    *(("smnist", mixer, 0) for mixer in ("s5", "s4d", "lru")),
)


def get_sweep():
    for task, mixer, seed in RUNS:
        folder = "standins" if task == "smnist" else "lra"
        yield {"config": f"configs/{folder}/{task}.py:mixer={mixer}", "seed": seed}
