"""Metrics of a language model whose caches of attention a policy keeps."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.analysis.in_chunks import in_chunks, prompt_length
from experiments.training.experiment import Experiment
from experiments.training.step import means
from layers.caches import CachePolicy
from seqmodels import LanguageModel, caching

CHUNK = 512


def check(plan: Experiment, model: Any, split: str, cache: CachePolicy) -> None:
    """Raises ValueError unless rows of a split can be read under the policy."""
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"cache={type(cache).__name__} of a {type(model).__name__}; expected a run of a language_model, whose rows can be read in "
            "parts"
        )
    for batch in plan.example_batches(split, 1):
        if batch["labels"].shape != batch["inputs"].shape:
            raise ValueError(
                f"cache={type(cache).__name__} on the task {plan.config['task']['name']!r}, whose labels {batch['labels'].shape} are not "
                "those of single tokens; expected a task of texts, such as language"
            )
        caching.check(model, cache, batch["inputs"].shape[1], 1)


def evaluate(
    plan: Experiment, model: LanguageModel, split: str, cache: CachePolicy, *, chunk: int = CHUNK
) -> dict[str, Any]:
    """Returns what `training.evaluation.Evaluator` does, of rows that are read in chunks under a policy.

    A policy that acts at the end of a prompt takes the first half of each row for one. Then the metrics of the second half stand
    under "after_prompt", which the policy has an effect on.

    Raises:
      ValueError: the policy cannot keep the caches of the model, or labels are not those of single tokens.
    """
    check(plan, model, split, cache)
    start = time.perf_counter()
    names = plan.metric_names
    total, after = np.zeros((2, len(names)))
    facts = dict(padding=plan.task.padding, packed=plan.task.packed)
    measure = functools.partial(_sums, plan.task, names)
    for batch in plan.eval_batches(split):
        batch = {name: np.asarray(array) for name, array in batch.items()}
        prompt = prompt_length(batch["inputs"].shape[1], cache)
        for begun, sums in in_chunks(model, batch, measure, chunk=chunk, cache=cache, **facts):
            sums = np.asarray(jax.device_get(sums), np.float64)
            total += sums
            after += sums if begun >= prompt else 0.0
    found = means(names, total) | dict(examples=round(total[names.index("count")]))
    if cache.compresses:
        found["after_prompt"] = means(names, after) | dict(examples=round(after[names.index("count")]))
    return found | dict(seconds=time.perf_counter() - start)


def _sums(task: Any, names: tuple[str, ...], outputs: Any, batch: Mapping[str, Any]) -> list[Any]:
    """Returns the task's sums over a chunk."""
    _, sums = task.loss(outputs if task.unprojected else outputs.logits, batch)
    return [sums[name] for name in names]
