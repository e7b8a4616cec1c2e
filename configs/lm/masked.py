"""Hidden tokens of a text from both sides: a masked language model (BERT), or one that tells which tokens a generator replaced (ELECTRA).

    python -m experiments.train --config=configs/lm/masked.py:mixer=attention --workdir=runs/masked
    python -m experiments.train --config=configs/lm/masked.py:mixer=longformer,kind=replaced --workdir=runs/replaced

Any mixer that reads whole sequences: mixer=NAME, bi_NAME for a causal one in both directions and bimamba for Mamba with shared
projections; width, depth, length, generator (its width), learning_rate and steps; source and tokenizer as in the task `language`.
kind=masked chooses 15% of the tokens, of which 80% are hidden, 10% replaced and
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
OWN = dict(kind="masked", length=256, generator=0, steps=2000)
BOTH = "bi_"


def get_config(arg: str = "") -> ConfigDict:
    options = read("masked.py", arg, mixer="attention", source="stdlib", tokenizer="bytes")
    task = dict(name="masked_language", length=options["length"], validation=200, test=400)
    return config_of(options, task | {name: options[name] for name in ("source", "tokenizer")})


def read(file: str, arg: str, **own: int | str) -> dict:
    """Returns the options of a config file: those of the recipe of stand-ins, of hidden tokens, and its own.

    Raises:
      ValueError: an option is unknown or invalid.
    """
    options = RECIPE["parse"](file, arg, **(dict(epochs=1) | OWN | own))
    if options["kind"] not in KINDS:
        raise ValueError(f"kind={options['kind']!r}; expected {' or '.join(KINDS)}")
    if options["generator"] and options["kind"] != "replaced":
        raise ValueError(f"generator={options['generator']} with kind='masked'; expected kind='replaced'")
    return options


def config_of(options: dict, task: dict) -> ConfigDict:
    """Returns the config of a model of hidden tokens on a task, with the options of `read`."""
    kind, mixer, replaced = KINDS[options["kind"]], options["mixer"], options["kind"] == "replaced"
    both = {}
    if mixer == "bimamba":
        both = dict(mixer="bidirectional", inner="mamba", tied="projections")
    elif mixer.startswith(BOTH):
        both = dict(mixer="bidirectional", inner=mixer.removeprefix(BOTH))
    if replaced:
        task |= dict(masked=1.0, random=0.0)
    config = RECIPE["stand_in"](
        options, task=task, kind=kind, length=options["length"], batch_size=16, **both
    )
    if options["generator"]:
        config.model.generator = dict(width=options["generator"])
    config.train = dict(batch_size=16, steps=options["steps"], eval_every=1.0, log_every=50)
    config.optimizer.update(warmup_epochs=None, warmup_steps=100)
    return config
