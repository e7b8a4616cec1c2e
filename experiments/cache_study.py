"""Measures what policies of caches cost in quality against their budget, on the language model of a run.

    python -m experiments.cache_study --workdir=runs/retrieval --out=results/caches --length=4096
    python -m experiments.cache_study --workdir=runs/retrieval --out=results/caches --policies=snapkv,h2o --budgets=1/16,1/4

Every policy is measured at every budget, a share of the tokens of a prompt: tasks of retrieval as in `long_context`, and the perplexity
of the second half of rows of the test split, of which the first half is the prompt. "full" is measured once. Policies that are given
something of the model, such as gates, stand in a JSON file of names and texts, --templates=FILE, in which {budget}, {half} and
{window} are tokens and {share} is the share. After each figure cache-study.json in the folder of --out is written again; the same
command goes on where it stopped. cache-study.png shows one panel per task.

`python -m experiments.data.retrieval_texts` writes texts to train on, and configs/lm/needles.py trains on them. Exit codes: 0 done; 2
an argument cannot be used.
"""

import fractions
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.config.command_line import (
    ArgumentError,
    Parser,
    folder,
    names,
    path,
    positive_integer,
    reporting,
)
from experiments.long_context import positions, retrieve
from experiments.runs.files import to_json_text, write_atomically
from experiments.runs.sessions import git_revision, versions
from experiments.training.trained import open_run
from layers.caches import read_cache
from layers.registry import suggestion

TASKS = ("passkey", "niah_multikey", "variable_tracking", "perplexity")
WINDOW = 32  # last tokens whose queries choose
TEMPLATES = {
    "streaming": "streaming(budget={budget}, sinks=4)",
    "snapkv": "snapkv(budget={budget}, window={window})",
    "pyramidkv": "pyramidkv(budget={budget}, window={window})",
    "cake": "cake(budget={budget}, window={window})",
    "h2o": "h2o(budget={budget})",
    "keyformer": "keyformer(budget={budget})",
    "sirllm": "sirllm(budget={budget}, sinks=4, recent={half})",
    "taskkv": "taskkv(whole=0.0, sinks=4, recent={window}, middle={rest})",
    "tokenselect": "tokenselect(budget={rest}, sinks=4, recent={window})",
    "recycled": "recycled(budget={budget}, stride=8)",
    "unlimiformer": "unlimiformer(budget={budget})",
    "squeezed": "squeezed(sparsity={left}, window={window})",
    "longheads": "longheads(budget={chunks}, chunk=16)",
    "infllm": "infllm(budget={blocks}, window={half}, sinks=4, unit=16, representatives=4, distance=true)",
    "shadowkv": "shadowkv(budget={eights}, rank=32, outliers=1, local=1)",
    "gemfilter": "gemfilter(budget={budget}, layer=3)",
    "minference": "minference(verticals={half}, slashes={half}, block=16, window={window}, near=16)",
    "hip": "hip(budget={eights}, window={window}, queries=32, block=8)",
    "kivi": "kivi(bits=2, group=16, residual=32)",
    "think": "think(ratio={left}, recent=32)",
    "cskv": "cskv(keys={share}, values={share}, window=32)",
}


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes and draws; returns the exit code."""
    args = _parser().parse_args(argv)
    templates = TEMPLATES | _given(args.templates)
    chosen = args.policies or tuple(templates)
    for name in chosen:
        if name not in templates:
            raise ArgumentError(
                f"--policies={name}: there is no such template{suggestion(name, templates)}; available: {', '.join(templates)}"
            )
    for task in args.tasks:
        if task not in TASKS:
            raise ArgumentError(
                f"--tasks={task}{suggestion(task, TASKS)}; expected one of {', '.join(TASKS)}"
            )
    budgets = _budgets(args.budgets)
    cases = [("full", "full", 1.0)]
    for name in chosen:
        texts = {filled(templates[name], budget, args.length): float(budget) for budget in reversed(budgets)}
        cases += [(name, text, share) for text, share in texts.items()]
    for _, text, _ in cases:
        try:
            read_cache(text)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{text}: {error}") from None
    run, plan, model, step = open_run(args.workdir, args.checkpoint)
    setting = dict(
        workdir=str(run.folder),
        step=step,
        length=args.length,
        examples=args.examples,
        rows=args.rows,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "cache-study.json"
    rows = _rows_so_far(file, setting)
    known = {(row["cache"], row["task"]) for row in rows}
    for name, text, share in cases:
        for task in args.tasks:
            if (text, task) in known:
                continue
            try:
                score = _measure(plan, model, task, read_cache(text), args)
                row = dict(policy=name, cache=text, share=share, task=task, score=score)
            except (ValueError, FloatingPointError) as error:
                row = dict(policy=name, cache=text, share=share, task=task, score=None, reason=str(error))
            rows.append(row)
            shown = "-" if row["score"] is None else f"{row['score']:.4g}"
            print(f"{text:60} {task:18} {shown}", flush=True)
            record = dict(setting=setting, versions=versions(), git=git_revision(), rows=rows)
            write_atomically(file, to_json_text(record))
    draw(rows, args.out / "cache-study.png")
    return 0


def _parser() -> Parser:
    parser = Parser("experiments.cache_study", __doc__, workdir=True)
    parser.add_argument(
        "--checkpoint", default="best", help="best (of validation; the default), last, or a step"
    )
    parser.add_argument("--out", type=folder, required=True, help="folder of the results")
    parser.add_argument(
        "--policies", type=names, default=(), help="names, separated by commas (default: all)"
    )
    parser.add_argument("--templates", type=path, help="JSON file of further names and texts of policies")
    parser.add_argument(
        "--budgets",
        type=names,
        default=("1/32", "1/16", "1/8", "1/4", "1/2"),
        help="shares of the prompt, separated by commas (default: 1/32,1/16,1/8,1/4,1/2)",
    )
    parser.add_argument("--tasks", type=names, default=TASKS, help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument(
        "--length", type=positive_integer, default=4096, help="tokens of a prompt (default: 4096)"
    )
    parser.add_argument(
        "--examples", type=positive_integer, default=50, help="prompts per task (default: 50)"
    )
    parser.add_argument("--rows", type=positive_integer, default=8, help="rows of perplexity (default: 8)")
    parser.add_argument("--batch", type=positive_integer, default=8, help="prompts at once (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: 0)")
    return parser


def filled(template: str, share: fractions.Fraction, length: int) -> str:
    """Returns the text of a policy at a share of a prompt of `length` tokens; sizes are what a policy takes at least."""
    budget = max(2 * WINDOW, int(share * length))
    sizes = dict(
        budget=budget,
        half=budget // 2,
        rest=budget - WINDOW - 4,
        window=WINDOW,
        chunks=budget // 16 * 16,
        blocks=max(1, budget // 32) * 16,
        eights=budget // 8 * 8,
        share=float(share),
        left=1 - float(share),
    )
    return template.format(**sizes)


def _budgets(given: Sequence[str]) -> list[fractions.Fraction]:
    found = []
    for text in given:
        try:
            share = fractions.Fraction(text)
        except (ValueError, ZeroDivisionError):
            share = fractions.Fraction(0)
        if not 0 < share < 1:
            raise ArgumentError(f"--budgets={text}; expected shares between 0 and 1, such as 1/8")
        found.append(share)
    return sorted(found)


def _given(file: Path | None) -> dict[str, str]:
    """Returns the templates of a file."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--templates={file}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ArgumentError(f"--templates={file}; expected a JSON object of names and texts of policies")
    return found


def _rows_so_far(file: Path, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of an earlier call; raises ArgumentError if it measured something else."""
    if not file.exists():
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        found, rows = dict(record["setting"]), list(record["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"--out={file.parent}: {file.name} is damaged ({type(error).__name__}: {error}); remove it, or give another folder"
        ) from None
    differs = [name for name, value in setting.items() if found.get(name) != value]
    if differs:
        raise ArgumentError(
            f"--out={file.parent} has figures with another {', '.join(differs)}; expected the same, or another folder"
        )
    return rows


def _measure(plan: Any, model: Any, task: str, cache: Any, args: Any) -> float:
    """Returns the score of a task, or the perplexity of the second half of rows."""
    if task == "perplexity":
        # Ranges end at half of a row, where prompts do.
        found = positions(plan.config["task"], model, args.length, args.rows, args.length // 2, cache)
        beyond = [one for one in found if one["beyond"]]
        nats = sum(one["nats"] * one["count"] for one in beyond) / sum(one["count"] for one in beyond)
        return math.exp(nats)
    given = (task, args.length, args.examples, args.seed, args.batch, cache)
    return retrieve(model, plan.task.tokenizer, *given)["score"]


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draws the figures against the share of the prompt, one panel per task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        here = [row for row in rows if row["task"] == task and row["score"] is not None]
        for name in dict.fromkeys(row["policy"] for row in here):
            points = sorted((row["share"], row["score"]) for row in here if row["policy"] == name)
            if name == "full":
                panel.axhline(points[0][1], color="black", linestyle="--", label=name)
            else:
                panel.plot(*np.transpose(points), marker="o", label=name)
        panel.set(xscale="log", xlabel="share of the prompt", title=task)
        panel.set_yscale("log" if task == "perplexity" else "linear")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7)
    FigureCanvasAgg(figure).print_png(file)


if __name__ == "__main__":
    sys.exit(main())
