"""Evaluates a checkpoint of a run, from its work directory alone, or a published checkpoint on the task of a config.

    python -m experiments.evaluate --workdir=runs/listops-s5 --split=test --checkpoint=best
    python -m experiments.evaluate --pretrained=checkpoints/Qwen3-0.6B --config=configs/lm/models.py:source=wikitext103

--pretrained takes a folder with config.json and safetensors (see `seqmodels.load_pretrained`), which needs --config: its task, with
the tokenizer.json of the folder if there is one, its batches and the options of training of its model, such as dtype. --adapter
adds a low-rank adapter in the format of peft to its matrices. Nothing is written.

    python -m experiments.evaluate --workdir=runs/lm --cache="snapkv(budget=256)"

--cache lets a policy keep the caches of attention of a language model (`list caches`), on one device. Rows are read in chunks; a policy
that acts at the end of a prompt takes the first half of each row for one, and "after_prompt" has the metrics of the second half.

Prints the metrics as JSON and writes them to evaluation-SPLIT-STEP.json in the work directory, if it can be written to, or to
evaluation-SPLIT-STEP-POLICY-HASH.json with --cache, the hash being that of the policy's options.
Nothing is written elsewhere: data that the config generates and that are not on disk yet are generated in a temporary folder.

A damaged checkpoint is named and left out: "best" and "last" then mean the best and the last of the others, and a step is
refused. So is a damaged config.json or manifest.json, and data that differ from those of the run.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from experiments.analysis import under_cache
from experiments.config.command_line import (
    REFUSALS,
    ArgumentError,
    Overrides,
    Parser,
    cache_policy,
    load,
    path,
    refuse,
    split_overrides,
)
from experiments.config.pretrained import with_pretrained_model
from experiments.data import cache
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import Checkpoints, choose_step
from experiments.runs.directory import RunDirectory
from experiments.runs.files import to_json_text, write_atomically
from experiments.training import experiment
from experiments.training.evaluation import Evaluator
from experiments.training.loop import restore
from experiments.training.pretrained import initial_state
from experiments.training.state import StateLayout, TrainState
from layers.caches import CachePolicy
from seqmodels.interop.files import TOKENIZER
from seqmodels.interop.hub import folder_of


class Opened(NamedTuple):
    """What is evaluated: a state and its experiment, and the fields of the record that name it."""

    plan: experiment.Experiment
    devices: Devices
    state: TrainState
    evaluate: Evaluator
    named: dict[str, int | str]
    layout: StateLayout


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates and reports; returns the exit code."""
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(rest)
    try:
        if (args.workdir is None) == (args.pretrained is None):
            raise ArgumentError("expected one of --workdir and --pretrained")
        if args.adapter is not None and args.pretrained is None:
            raise ArgumentError(
                f"--adapter={args.adapter} needs --pretrained, the checkpoint that it belongs to"
            )
        if (args.config is None) != (args.pretrained is None) or (overrides and args.config is None):
            raise ArgumentError(
                "--pretrained needs --config, which has the task; --workdir has its own config"
            )
        if args.cache is not None and args.num_devices not in (None, 1):
            raise ArgumentError(f"--num_devices={args.num_devices} with --cache; expected 1 device")
        opened = _of_run(args) if args.pretrained is None else _published(args, overrides)
        evaluate = opened.evaluate if args.cache is None else _under_cache(opened, args)
    except REFUSALS as error:
        return refuse(error)
    if args.cache is None:
        opened.evaluate.compile(opened.state, args.split)
    metrics = evaluate(opened.state, args.split)
    record = dict(split=args.split, **opened.named, devices=opened.devices.describe()) | metrics
    text = to_json_text(record | dict(baselines=opened.plan.baselines(args.split)))
    print(text, end="", flush=True)
    if args.workdir is None:
        return 0
    policy = "" if args.cache is None else f"-{_short_name(args.cache)}"
    file = RunDirectory(args.workdir).folder / f"evaluation-{args.split}-{opened.named['step']}{policy}.json"
    try:
        write_atomically(file, text)
    except OSError as error:
        print(f"{file} cannot be written: {error.strerror}", file=sys.stderr)
    return 0


def parser() -> Parser:
    """Returns the parser of the command."""
    made = Parser("experiments.evaluate", __doc__)
    made.add_argument("--workdir", type=path, help="directory of the run")
    made.add_argument(
        "--pretrained", help="folder of a published checkpoint, or its identifier, in place of --workdir"
    )
    made.add_argument(
        "--adapter", help="with --pretrained: folder of a low-rank adapter (peft's format), or its identifier"
    )
    made.add_argument(
        "--config",
        metavar="FILE[:KEY=VALUE,...]",
        help="with --pretrained: the config whose task it is evaluated on; --config.SECTION.FIELD=VALUE sets a field",
    )
    made.add_argument("--split", default="test", help="split of the task (default: test)")
    made.add_argument(
        "--checkpoint", default="best", help="of a run: best (of validation; the default), last, or a step"
    )
    made.add_argument("--num_devices", type=int, help="use the first devices, this many (default: all)")
    made.add_argument(
        "--cache",
        type=cache_policy,
        metavar="NAME(KEY=VALUE,...)",
        help="policy of the caches of attention, such as snapkv(budget=256); `list caches` shows them",
    )
    return made


def _short_name(cache: CachePolicy) -> str:
    """Returns a name for files, which differs where the options of a policy do."""
    return f"{type(cache).__name__.lower()}-{hashlib.sha256(repr(cache).encode()).hexdigest()[:8]}"


def _devices(args: argparse.Namespace, plan: experiment.Experiment) -> Devices:
    """Returns the devices to evaluate on: one with a policy of caches, whose states are not divided."""
    return Devices.first(args.num_devices, plan.mesh) if args.cache is None else Devices.first(1)


def _under_cache(opened: Opened, args: argparse.Namespace) -> Callable[[TrainState, str], dict[str, Any]]:
    """Returns what evaluates a split under a policy of caches; raises ArgumentError if the policy does not fit."""
    parameters = jax.jit(opened.layout.packing.cut)(opened.state.evaluated)
    model = opened.plan.model.module(parameters, opened.state.statistics)
    try:
        under_cache.check(opened.plan, model, args.split, args.cache)
    except ValueError as error:
        raise ArgumentError(f"--cache: {error}") from None
    opened.named["cache"] = str(args.cache)
    return lambda _, split: under_cache.evaluate(opened.plan, model, split, args.cache)


def _of_run(args: argparse.Namespace) -> Opened:
    run = RunDirectory(args.workdir)
    config = run.config()
    with Checkpoints(run.checkpoints) as checkpoints, cache.temporary_builds():
        step = choose_step(checkpoints, args.checkpoint)
        plan = experiment.build(config)
        run.check_data(plan.task.manifest, "restore that data to evaluate the run")
        devices = _devices(args, plan)
        functions = plan.step_functions(devices)
        plan.eval_batches(args.split)  # raises for an unknown split before anything is computed
        state, _ = restore(functions.layout, checkpoints, step)
    return Opened(plan, devices, state, Evaluator(plan, functions, devices), {"step": step}, functions.layout)


def _published(args: argparse.Namespace, overrides: Overrides) -> Opened:
    try:
        file = folder_of(args.pretrained) / TOKENIZER
    except ValueError as error:
        raise ArgumentError(f"--pretrained={args.pretrained}: {error}") from None
    config = load(args.config, overrides)
    task = config["task"]
    if task.get("name") == "language" and file.exists():
        task = task | {"tokenizer": str(file)}
    config |= {"task": task, "train": config["train"] | {"pretrained": args.pretrained, "lora": None}}
    with cache.temporary_builds():
        plan = experiment.build(with_pretrained_model(config, replace=True))
        devices = _devices(args, plan)
        functions = plan.step_functions(devices)
        plan.eval_batches(args.split)
    named = {"pretrained": str(args.pretrained)}
    if args.adapter is not None:
        named["adapter"] = args.adapter
    try:
        state = initial_state(plan, functions.layout, devices, args.adapter)
    except ValueError as error:
        raise ArgumentError(f"--adapter={args.adapter}: {error}" if args.adapter else str(error)) from None
    return Opened(plan, devices, state, Evaluator(plan, functions, devices), named, functions.layout)


if __name__ == "__main__":
    sys.exit(main())
