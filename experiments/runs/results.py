"""The results of a finished run, as a record and as text."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from experiments.parallel.mesh import Devices
from experiments.runs.sessions import git_revision, versions
from experiments.training.experiment import Experiment
from experiments.training.loop import TEST, VALIDATION, Outcome


def summarize(experiment: Experiment, outcome: Outcome, devices: Devices) -> dict[str, Any]:
    """Returns the record that results.json holds."""
    note = outcome.note
    tokens = note.records["tokens"]
    test = outcome.test is not None
    return dict(
        selection=list(experiment.selection),
        best_step=outcome.best_step,
        validation=outcome.validation,
        test=outcome.test,
        baselines=experiment.baselines(TEST if test else VALIDATION),
        steps=experiment.total_steps,
        steps_per_epoch=experiment.steps_per_epoch,
        parameters=experiment.model.num_parameters,
        tokens=tokens,
        tokens_per_second=tokens / max(note.training_seconds, 1e-9),
        training_seconds=note.training_seconds,
        eval_seconds=note.eval_seconds + (outcome.test["seconds"] if test else 0.0),
        compile_seconds=note.compile_seconds,
        devices=devices.describe(),
        versions=versions(),
        git=git_revision(),
        manifest_sha256=manifest_sha256(experiment.task.manifest),
        config=experiment.config,
    )


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Returns the hash of a data manifest, independent of the order of its fields."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def total_seconds(results: Mapping[str, Any]) -> float:
    """Returns the total seconds of training, evaluation and compilation."""
    return results["training_seconds"] + results["eval_seconds"] + results["compile_seconds"]


def number(value: float | None) -> str:
    """Returns a metric as text; results hold null where it was not finite."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def describe(results: Mapping[str, Any]) -> str:
    """Returns the results as a few lines of text."""

    def metrics(values: Mapping[str, float]) -> str:
        shown = (
            f"{name} {number(value)}" for name, value in values.items() if name not in ("examples", "seconds")
        )
        return ", ".join(shown)

    lines = [
        f"best step   {results['best_step']} of {results['steps']} (validation: {metrics(results['validation'])})"
    ]
    if results["test"] is not None:
        lines.append(f"test        {metrics(results['test'])}")
    if results["baselines"]:
        lines.append(f"baselines   {metrics(results['baselines'])}")
    seconds = [
        f"{results[f'{name}_seconds']:.1f} s {verb}"
        for name, verb in (("training", "training"), ("eval", "evaluating"), ("compile", "compiling"))
    ]
    lines.append(
        f"time        {', '.join(seconds)}; {results['tokens_per_second']:,.0f} tokens/s in training"
    )
    lines.append(f"model       {results['parameters']:,} parameters on {results['devices']}")
    return "\n".join(lines)
