"""Learning rates of the 125M models on the RFCs: three each, in runs of 200 steps.

    TOKENS=FOLDER python -m experiments.sweep --file=configs/lm/_rates.py --out=runs/rates

FOLDER is what `python -m experiments.data.prepare text --source=rfc --tokenizer=bpe:32768 --invalid=replace --official_dir=...` wrote,
text-v1-HASH in its data directory. Only the first 256 rows of the validation split are read.
"""

import os

MIXERS = ("attention", "gated_deltanet_3_1", "gated_deltanet", "mamba2", "gla", "kda", "rwkv7", "mamba")
RATES = (7e-4, 1.5e-3, 3e-3)


def get_sweep():
    for mixer in MIXERS:
        for rate in RATES:
            yield {
                "config": f"configs/lm/models.py:size=125m,mixer={mixer},source=rfc,tokens=6553600",
                "task.source": os.environ["TOKENS"],
                "task.validation": 256,
                "optimizer.learning_rate": rate,
                "optimizer.warmup_steps": 50,
                "train.eval_every": 1,
                "train.checkpoint_every": None,
            }
