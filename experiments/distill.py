r"""Replaces layers of a trained model by another mixer in stages, each distilled from the trained model, and compares them.

    python -m experiments.train --config=configs/synthetic/mqar.py:mixer=attention,depth=4 --workdir=runs/teacher
    python -m experiments.distill --config=configs/synthetic/mqar.py:mixer=attention,depth=4 --teacher=runs/teacher \
        --mixer=mamba2 --replace=1,2,3 --workdir=runs/hybrid --config.train.steps=300

The way of Apriel-H1 (Ostapenko et al. 2025, arXiv:2511.02651): before each stage the layers that are left are ranked by what the
validation loses without their mixer, and the least important ones get the mixer, until --replace of them have it. A stage begins with
the weights of the one before, learns from the teacher by the reverse divergence, unless --config.train.distill.FIELD says otherwise, and is
a run of `experiments.train` in WORKDIR/COUNT, which receives all further flags. The config is that of the teacher. A `mamba2` has the heads
of the attention it replaces and begins with its maps.

stages.json in the work directory has the importances, the layers and the metrics of each stage; the same command goes on where it
stopped. Exit codes: 0 done; 2 an argument cannot be used; otherwise that of the run that did not finish.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis.importance import leave_one_out
from experiments.compare import table
from experiments.config.command_line import (
    REFUSALS,
    ArgumentError,
    Parser,
    load,
    path,
    positive_integers,
    refuse,
    split_overrides,
)
from experiments.config.loading import differences
from experiments.data import cache
from experiments.runs.directory import RunDirectory
from experiments.runs.files import to_json_text, write_atomically
from experiments.runs.results import total_seconds
from experiments.runs.trainings import run_training
from experiments.training import experiment
from experiments.training.experiment import Experiment
from experiments.training.teacher import open_source, split
from layers.mixers import MIXERS
from layers.mixers.attention.attention import Attention
from layers.registry import suggestion
from seqmodels.config import parse
from seqmodels.from_attention import mamba2_options

FILE = "stages.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Ranks, trains and compares; returns the exit code."""
    args, more = _parser().parse_known_args(argv)
    try:
        _, overrides = split_overrides(more)
        with cache.temporary_builds():
            plan = _plan(args, overrides)
        file = args.workdir / FILE
        if file.exists():
            record = json.loads(file.read_text())
        else:
            teacher = dict(folder=str(args.teacher), **_kept(args.teacher))
            record = dict(mixer=args.mixer, teacher=teacher, stages={})
        _check(args, record)
    except REFUSALS as error:
        return refuse(error)
    source, replaced = args.teacher, []
    for count in args.replace:
        known = record["stages"].setdefault(str(count), {})
        if "layers" not in known:
            left = [layer for layer in range(parse(plan.values).stack.depth) if layer not in replaced]
            model = open_source("--teacher", source, plan.config, plan.task)
            known["importances"] = {
                str(layer): value for layer, value in leave_one_out(plan, model, left).items()
            }
            # The stable order leaves equal layers as they stand.
            least = sorted(left, key=lambda layer: known["importances"][str(layer)])
            known["layers"] = sorted([*replaced, *least[: count - len(replaced)]])
            _write(file, record)
        replaced = known["layers"]
        print(f"{count} layers: {args.mixer} in {', '.join(map(str, replaced))}", flush=True)
        folder = args.workdir / str(count)
        if code := run_training(_stage(args, plan, replaced, source, folder, more)):
            return code
        known |= _kept(folder)
        _write(file, record)
        source = folder
    print(_table(plan, record))
    return 0


def _parser() -> Parser:
    parser = Parser("experiments.distill", __doc__, workdir=True)
    parser.add_argument(
        "--config", required=True, help="the config of the teacher; overrides are those of the stages"
    )
    parser.add_argument("--teacher", required=True, type=path, help="work directory of the trained model")
    parser.add_argument("--mixer", required=True, help="name of the mixer that replaces others")
    parser.add_argument(
        "--replace",
        required=True,
        type=positive_integers,
        help="numbers of replaced layers, one a stage, rising",
    )
    return parser


def _plan(args: Any, overrides: list[tuple[str, str]]) -> Experiment:
    """Returns the experiment of the teacher's model on the task of the stages; raises unless the arguments fit together."""
    if args.mixer not in MIXERS:
        raise ArgumentError(f"--mixer={args.mixer}: there is no such mixer{suggestion(args.mixer, MIXERS)}")
    own = f"model.mixers.{args.mixer}."
    config = load(args.config, [(name, text) for name, text in overrides if not name.startswith(own)])
    depth = config["model"]["depth"]
    if list(args.replace) != sorted(set(args.replace)) or args.replace[-1] > depth:
        raise ArgumentError(
            f"--replace={','.join(map(str, args.replace))}; expected rising numbers of at most the depth, {depth}"
        )
    theirs = RunDirectory(args.teacher).config()
    if lines := differences({"model": theirs["model"]}, {"model": config["model"]}):
        raise ArgumentError(
            f"--teacher={args.teacher} has another model than --config; give the config of the teacher:\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    return experiment.build(config)


def _check(args: Any, record: Mapping[str, Any]) -> None:
    """Raises unless the work directory is new or that of the same command."""
    then, now = (record["teacher"]["folder"], record["mixer"]), (str(args.teacher), args.mixer)
    if then != now:
        raise ArgumentError(
            f"--workdir={args.workdir} holds stages of the teacher {then[0]} with {then[1]}, not of {now[0]} with {now[1]}; give "
            "another folder"
        )
    args.workdir.mkdir(parents=True, exist_ok=True)


def _write(file: Path, record: Mapping[str, Any]) -> None:
    write_atomically(file, to_json_text(record))


def _stage(
    args: Any, plan: Experiment, replaced: Sequence[int], source: Path, folder: Path, more: Sequence[str]
) -> list[str]:
    """Returns the arguments of `experiments.train` for a stage."""
    stack = parse(plan.values).stack
    kinds = [stack.pattern[layer % len(stack.pattern)] for layer in range(stack.depth)]
    for layer in replaced:
        _, plus, channel = kinds[layer].partition("+")
        kinds[layer] = f"{args.mixer}{plus}{channel}"
    fields: dict[str, Any] = {
        "model.pattern": ",".join(kinds) + ("," if len(kinds) == 1 else ""),
        "train.distill.teacher": args.teacher,
        "train.distill.start": "teacher" if source == args.teacher else source,
        "train.distill.divergence": "reverse",
    }
    if args.mixer == "mamba2":
        options = _options(plan, replaced[0])
        fields |= {f"model.mixers.mamba2.{name}": value for name, value in options.items()}
    set_here = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={args.config}", f"--workdir={folder}", *set_here, *more]


def _options(plan: Experiment, layer: int) -> dict[str, int]:
    """Returns the options of a Mamba-2 in place of the mixer of a layer: those that fit an attention."""
    mixers = split({**plan.values, "scan": False}, plan.task).mixers
    kind, config = mixers[f"stack/blocks/{layer}/mixer"]
    return mamba2_options(config) if kind is Attention else {}


def _kept(folder: Path) -> dict[str, Any]:
    """Returns what the record keeps of a finished run."""
    results = RunDirectory(folder).results()
    return dict(
        validation=results["validation"],
        test=results["test"],
        parameters=results["parameters"],
        seconds=total_seconds(results),
    )


def _table(plan: Experiment, record: Mapping[str, Any]) -> str:
    """Returns the metric that chooses checkpoints, of the teacher and of each stage."""
    metric = plan.selection[0]
    runs = {"teacher": record["teacher"]} | {f"{n} replaced": kept for n, kept in record["stages"].items()}
    name = "validation" if record["teacher"]["test"] is None else "test"
    rows = {run: {**kept, "value": kept[name][metric]} for run, kept in runs.items() if name in kept}
    return table(f"{name} {metric}", rows, plan.baselines(name))


if __name__ == "__main__":
    sys.exit(main())
