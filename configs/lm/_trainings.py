"""Trainings of the 125M models on 201M tokens of the RFCs, each at the best learning rate of `_rates.py`.

    TOKENS=FOLDER python -m experiments.sweep --file=configs/lm/_trainings.py --out=runs/rfc --devices 0 1

FOLDER is a prepared corpus, as in `_rates.py`. The models without a result in experiments/results/lm_rfc_h200 come first. A model
without a sweep of its own has the rate of the config.
"""

import os

RATES = {
    "mamba2": 3e-3,
    "gla": 1.5e-3,
    "kda": 1.5e-3,
    "rwkv7": 1.5e-3,
    "mamba": 1.5e-3,
    "gated_deltanet": 1.5e-3,
    "gated_deltanet_3_1": 3e-3,
    "attention": 1.5e-3,
}


def get_sweep():
    for mixer, rate in RATES.items():
        yield {
            "config": f"configs/lm/models.py:size=125m,mixer={mixer},source=rfc,tokens=201m",
            "task.source": os.environ["TOKENS"],
            "optimizer.learning_rate": rate,
            "model.scan": False,
            "train.eval_every": 0.6,
            "train.checkpoint_every": None,
            "train.log_every": 20,
        }
