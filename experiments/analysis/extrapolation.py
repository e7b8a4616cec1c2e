"""Bits per byte of language models on rows longer than those of training, by rule of position.

    python -m experiments.analysis.extrapolation --runs=runs/extrapolation --out=experiments/results/extrapolation

`--runs` is the folder of a sweep over configs/lm/extrapolation.py. Every model is evaluated at its last step on rows of 1, 2, 4, ...
times its length, as many bytes at each: with the rule that it was trained with, and RoPE also with what changes evaluation alone: linear
interpolation, NTK's base, YaRN and Giraffe's truncated base, each for the length of the rows, windows as long as rows of training, and
LM-Infinite. Mamba-2 is also evaluated after LongMamba. Writes results.json, table.md and plot.png.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.config.command_line import REFUSALS, ArgumentError, Parser, folder, positive_integer, refuse
from experiments.data import cache
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import Checkpoints, choose_step
from experiments.runs.directory import RunDirectory
from experiments.runs.files import to_json_text, write_atomically
from experiments.runs.sessions import git_revision, versions
from experiments.training import experiment
from experiments.training.evaluation import Evaluator
from experiments.training.loop import restore
from layers.segments import Segments
from seqmodels.lengthen import LengthenConfig, lengthen

FACTORS = (1, 2, 4, 8, 16)
ROWS = 256  # of the length of training; longer ones are fewer
SAMPLE = 64  # rows of training that LongMamba reads
SINKS = 10


def rope(**options: Any) -> dict[str, Any]:
    """Options of mixers with these rotary positions."""
    return dict(position=dict(name="rope", **options))


# From the ratio of lengths and the length of training to options of mixers that are changed for evaluation.
Change = Callable[[int, int], dict[str, Any]]
OF_ROPE: dict[str, Change] = {
    "linear": lambda s, _: rope(scaling="linear", factor=float(s)),
    "ntk": lambda s, _: rope(scaling="ntk", factor=float(s)),
    "yarn": lambda s, n: rope(scaling="yarn", factor=float(s), length=n),
    "truncated": lambda _, n: rope(scaling="truncated", length=n),
    "window": lambda _, n: dict(window=n),
    "lm_infinite": lambda _, n: dict(window=n, sink_tokens=SINKS, sink_distance="window"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule at a length, and the runs of its seeds.

    Attributes:
      name: of the row in the table.
      runs: folders of runs by seed.
      change: options of mixers that evaluation changes.
      lengthened: whether LongMamba prepares the model.
    """

    name: str
    runs: Mapping[int, Path]
    change: Change = lambda *_: {}
    lengthened: bool = False


def cases(runs: Mapping[str, Mapping[int, Path]]) -> list[Case]:
    """Returns what is evaluated, given the folders of runs by rule and seed."""
    found = []
    for rule, seeds in runs.items():
        found.append(Case(rule, seeds))
        if rule == "rope":
            found += [Case(f"rope, {name}", seeds, change) for name, change in OF_ROPE.items()]
        if rule == "mamba2":
            found.append(Case("mamba2, LongMamba", seeds, lengthened=True))
    return found


def finished(out: Path) -> dict[str, dict[int, Path]]:
    """Returns the folders of finished runs by rule and seed.

    Raises:
      ArgumentError: there is none.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(out.glob("*/results.json")):
        config = RunDirectory(path.parent).config()
        found.setdefault(rule_of(config), {})[config["seed"]] = path.parent
    if not found:
        raise ArgumentError(f"--runs={out} holds no finished run of configs/lm/extrapolation.py")
    return found


def rule_of(config: Mapping[str, Any]) -> str:
    """Returns the rule of a config of configs/lm/extrapolation.py, from its model."""
    model = config["model"]
    mixer, position = model["pattern"][0], model["mixer_defaults"].get("position", "none")
    if mixer != "attention":
        return mixer
    if model.get("absolute_positions", "none") != "none":
        return model["absolute_positions"]
    if not isinstance(position, Mapping):
        return position
    if position["name"] == "rope" and model.get("stretch", 1) > 1:
        return "random"
    if position.get("still"):
        return "hope"
    return position.get("scaling", position["name"])


def evaluated(case: Case, factor: int, devices: Devices) -> list[dict[str, Any]]:
    """Returns a row of results per seed, for rows of `factor` times the length of training."""
    config = RunDirectory(next(iter(case.runs.values()))).config()
    length, model = config["task"]["length"], dict(config["model"])
    model["mixer_defaults"] = model["mixer_defaults"] | case.change(factor, length)
    task = config["task"] | dict(length=factor * length, test=max(1, ROWS // factor))
    with cache.temporary_builds():
        plan = experiment.build(config | dict(model=model, task=task))
    functions = plan.step_functions(devices)
    run, rows = Evaluator(plan, functions, devices), []
    for seed, path in case.runs.items():
        with Checkpoints(RunDirectory(path).checkpoints) as checkpoints:
            step = choose_step(checkpoints, "last")
            state, _ = restore(functions.layout, checkpoints, step)
        start = time.perf_counter()
        if case.lengthened:
            parameters = jax.jit(functions.layout.packing.cut)(state.evaluated)
            found = _lengthened(
                plan, plan.model.module(parameters, state.statistics), factor * length, length
            )
        else:
            found = run(state, "test")
        rows.append(
            dict(
                rule=case.name,
                seed=seed,
                factor=factor,
                length=factor * length,
                bits_per_byte=found["bits_per_byte"],
                step=step,
                seconds=time.perf_counter() - start,
            )
        )
    return rows


def _lengthened(plan: Any, model: Any, length: int, trained: int) -> dict[str, float]:
    """Returns the metrics of the test split after `lengthen`."""
    sample = np.concatenate([batch["inputs"] for batch in plan.eval_batches("test")])
    # The first tokens of the rows: as many as in training.
    lengthen(model, sample[:SAMPLE, :trained], LengthenConfig(length=length))
    graph, variables = nnx.split(model)

    @jax.jit
    def sums(variables, batch):
        segments = Segments.of(batch.get("segment_ids"), padding=plan.task.padding, packed=plan.task.packed)
        outputs, _ = nnx.merge(graph, variables).unprojected(batch["inputs"], segment_ids=segments)
        found = plan.task.loss(outputs, batch)[1]
        return found["bits_per_byte"], found["bits_per_byte_count"]

    bits, count = np.sum([sums(variables, batch) for batch in plan.eval_batches("test")], axis=0)
    return dict(bits_per_byte=float(bits / count))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns means and standard deviations over seeds, one line per rule."""
    values = _by_rule(rows)
    factors = sorted({factor for found in values.values() for factor in found})
    lines = ["| rule | " + " | ".join(f"{factor} x" for factor in factors) + " |"]
    lines.append("|---" * (len(factors) + 1) + "|")
    for rule, found in values.items():
        cells = [
            f"{np.mean(found[f]):.3f} ± {np.std(found[f], ddof=1 if len(found[f]) > 1 else 0):.3f}"
            for f in factors
        ]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draws the mean over seeds against the length: rules of training on the left, those of RoPE's evaluation on the right."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (rule, found) in enumerate(_by_rule(rows).items()):
        points = sorted((factor, np.mean(values)) for factor, values in found.items())
        for axes, wanted in ((left, "," not in rule), (right, "," in rule or rule in ("rope", "mamba2"))):
            if wanted:
                axes.plot(*zip(*points), marker="os^vDPX*"[number % 8], markersize=4, label=rule)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="length of rows, in lengths of training")
        axes.set_xticks(FACTORS, [str(factor) for factor in FACTORS])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    left.set(ylabel="bits per byte of the test split")
    FigureCanvasAgg(figure).print_png(path)


def _by_rule(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, list[float]]]:
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        found.setdefault(row["rule"], {}).setdefault(row["factor"], []).append(row["bits_per_byte"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates, prints and writes; returns the exit code."""
    parser = Parser("experiments.analysis.extrapolation", __doc__)
    parser.add_argument("--runs", required=True, type=folder, help="folder of the sweep")
    parser.add_argument("--out", required=True, type=folder, help="folder of the results")
    parser.add_argument(
        "--longest", type=positive_integer, default=max(FACTORS), help="largest ratio of lengths"
    )
    args = parser.parse_args(argv)
    try:
        found = cases(finished(args.runs))
        devices = Devices.first(1)
    except REFUSALS as error:
        return refuse(error)
    rows: list[dict[str, Any]] = []
    for case in found:
        for factor in (factor for factor in FACTORS if factor <= args.longest):
            rows += evaluated(case, factor, devices)
            print(
                f"{case.name}, {factor} x: {[round(row['bits_per_byte'], 3) for row in rows[-len(case.runs) :]]}",
                flush=True,
            )
    args.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m experiments.analysis.extrapolation --runs={args.runs} --out={args.out}"
    record = dict(
        command=command, device=devices.describe(), git=git_revision(), versions=versions(), rows=rows
    )
    write_atomically(args.out / "results.json", to_json_text(record))
    write_atomically(args.out / "table.md", table(rows))
    draw(rows, args.out / "plot.png")
    print(f"\n{table(rows)}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
