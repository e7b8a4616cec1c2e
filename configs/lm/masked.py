"""Hidden tokens of a text from both sides: a masked language model (BERT), or one that tells which tokens a generator replaced (ELECTRA).

    python -m experiments.train --config=configs/lm/masked.py:mixer=attention --workdir=runs/masked
    python -m experiments.train --config=configs/lm/masked.py:mixer=longformer,kind=replaced --workdir=runs/replaced

Any mixer that sees whole sequences, recurrences in both directions: mixer=NAME, width, depth, length, generator (its width), learning_rate
and steps; source and tokenizer as in the task `language`. kind=masked chooses 15% of the tokens, of which 80% are hidden, 10% replaced and
10% kept (arXiv:1810.04805). kind=replaced hides all of them, has a generator of a quarter of the width and a weight of 50
(arXiv:2003.10555); with longformer it is the training of BudgetLongformer (arXiv:2211.17135). The test results print what the frequencies
of tokens reach, and those of the two neighbours.

Results: not measured here yet.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RECIPE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "standins" / "_recipe.py"))
KINDS = {"masked": "masked_language_model", "replaced": "replaced_token_detector"}
OWN = dict(kind="masked", length=256, generator=0, steps=2000, source="stdlib", tokenizer="bytes")


def get_config(arg: str = "") -> ConfigDict:
    options = RECIPE["parse"]("masked.py", arg, mixer="attention", epochs=1, **OWN)
    kind, length = options["kind"], options["length"]
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; expected {' or '.join(KINDS)}")
    task = dict(name="masked_language", length=length, validation=200, test=400)
    task |= dict(source=options["source"], tokenizer=options["tokenizer"])
    if kind == "replaced":
        task |= dict(masked=1.0, random=0.0)
    config = RECIPE["stand_in"](options, task=task, kind=KINDS[kind], length=length, batch_size=16)
    if options["generator"]:
        if kind != "replaced":
            raise ValueError(f"generator={options['generator']} with kind={kind!r}; expected kind='replaced'")
        config.model.generator = dict(width=options["generator"])
    config.train = dict(batch_size=16, steps=options["steps"], eval_every=0.05, log_every=50)
    config.optimizer.update(warmup_epochs=None, warmup_steps=100)
    return config
