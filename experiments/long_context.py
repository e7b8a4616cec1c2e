"""Measures what the language model of a run makes of long context, from its work directory alone.

    python -m experiments.long_context --workdir=runs/lm --positions=8192 --rows=16
    python -m experiments.long_context --workdir=runs/lm --tasks=passkey,niah_single --lengths=1024,4096 --examples=20

--positions reads rows of so many tokens of the test split, documents one after the other, with a carried state, and prints the
loss by position: whether longer context helps, and what happens beyond the length of training. --tasks continues prompts that
ask for a fact far back (`experiments.data.retrieval_prompts`), greedily, and prints the share of the answers that the
continuations contain. With --cache, a policy keeps the caches of attention: it acts after the prompt, or in the middle of the
rows of --positions. Everything, with prompts, answers and continuations, goes to long-context-STEP.json in the work
directory. Exit codes: 0 done; 2 the run or an argument cannot be used; 65 a logit is not finite.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.analysis.positions import by_range, losses_by_position
from experiments.analysis.positions import table as positions_table
from experiments.config.command_line import (
    EXIT_DIVERGED,
    ArgumentError,
    Parser,
    cache_policy,
    positive_integer,
    positive_integers,
    reporting,
)
from experiments.data import retrieval_prompts
from experiments.data.cache import temporary_builds
from experiments.data.text.rows import TRAINING
from experiments.runs.files import to_json_text, write_atomically
from experiments.tasks import make_task
from experiments.training.trained import open_run
from layers.caches import CachePolicy
from layers.registry import suggestion
from seqmodels import LanguageModel, generate

SPLIT = "test"
# Tokens that a continuation has beside those of the answers.
SPARE = 16
DEFAULTS = dict(rows=16, lengths=(1024,), examples=20, seed=0, batch=8)


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    args = _parser().parse_args(argv)
    if not args.positions and not args.tasks:
        raise ArgumentError("give --positions=LENGTH, --tasks=NAMES, or both")
    for used, needed in (
        ("rows", "positions"),
        *((name, "tasks") for name in ("lengths", "examples", "seed", "batch")),
    ):
        if getattr(args, used) is None:
            setattr(args, used, DEFAULTS[used])
        elif not getattr(args, needed):
            raise ArgumentError(f"--{used} has no effect without --{needed}")
    run, plan, model, step = open_run(args.workdir, args.checkpoint)
    if args.positions:
        run.check_data(plan.task.manifest, "restore that data, of which --positions takes the test split")
    trained = int(max(split.lengths.max() for split in plan.task.splits.values()))
    record: dict[str, Any] = dict(step=step, trained_length=trained)
    if args.cache is not None:
        record["cache"] = str(args.cache)
    try:
        if args.positions:
            rows = positions(plan.config["task"], model, args.positions, args.rows, trained, args.cache)
            record["positions"] = rows
            print(positions_table(rows), flush=True)
        if args.tasks:
            record["retrieval"] = []
            for task in args.tasks:
                for length in args.lengths:
                    given = (task, length, args.examples, args.seed, args.batch, args.cache)
                    found = retrieve(model, plan.task.tokenizer, *given)
                    record["retrieval"].append(found)
                    print(f"{task:18} {length:8d} tokens  {found['score']:6.1%}", flush=True)
    except FloatingPointError as error:
        print(f"\n{error}", file=sys.stderr)
        return EXIT_DIVERGED
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    file = run.folder / f"long-context-{step}.json"
    try:
        write_atomically(file, to_json_text(record))
    except OSError as error:
        print(f"{file} cannot be written: {error.strerror}", file=sys.stderr)
    return 0


def _parser() -> Parser:
    parser = Parser("experiments.long_context", __doc__, workdir=True)
    parser.add_argument(
        "--checkpoint", default="best", help="best (of validation; the default), last, or a step"
    )
    parser.add_argument(
        "--positions", type=positive_integer, help="print the loss by position in rows of so many tokens"
    )
    parser.add_argument("--rows", type=positive_integer, help="number of rows for --positions (default: 16)")
    parser.add_argument(
        "--tasks",
        type=_tasks,
        default=(),
        help="tasks of retrieval, separated by commas, or all: " + ", ".join(retrieval_prompts.TASKS),
    )
    parser.add_argument(
        "--lengths",
        type=positive_integers,
        help="tokens of a prompt, separated by commas (default: 1024)",
    )
    parser.add_argument("--examples", type=positive_integer, help="prompts per task and length (default: 20)")
    parser.add_argument("--seed", type=int, help="seed of the prompts (default: 0)")
    parser.add_argument(
        "--batch", type=positive_integer, help="prompts that are continued at once (default: 8)"
    )
    parser.add_argument(
        "--cache",
        type=cache_policy,
        metavar="NAME(KEY=VALUE,...)",
        help="policy of the caches of attention, such as snapkv(budget=1024); `list caches` shows them",
    )
    return parser


def _tasks(text: str) -> tuple[str, ...]:
    """Returns the names of tasks in a line of comma-separated values. A type of arguments."""
    known = retrieval_prompts.TASKS
    names = tuple(known) if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in known:
            hint = suggestion(name, known) or f"; choose from all, {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"unknown task {name!r}{hint}")
    return names


def positions(
    task: Mapping[str, Any],
    model: LanguageModel,
    length: int,
    rows: int,
    trained: int,
    cache: CachePolicy | None = None,
) -> list[dict[str, Any]]:
    """Returns the loss by ranges of positions (see `positions.by_range`) in long rows of the test split.

    Args:
      task: section `task` of the run; a task of texts.
      length: number of tokens of a row.
      rows: largest number of rows.
      trained: length of the rows of training.
      cache: policy of the caches of attention.

    Raises:
      ValueError: if the split has not enough text for a row, or the model has no positions for it.
    """
    table = model.config.input.longest
    if table is not None and length > table:
        raise ValueError(
            f"--positions={length}, but the model has max_positions={model.config.input.max_positions}; expected at most {table}"
        )
    options = dict(task) | TRAINING | dict(length=length, packing="concatenate", reset=False)
    # Other splits may have less text than one long row.
    options |= {SPLIT: rows}
    with temporary_builds():
        source = make_task(**options).splits[SPLIT]
    batch = source.gather(np.arange(len(source)), length)
    return by_range(losses_by_position(model, batch["inputs"], batch["labels"], cache=cache), trained=trained)


def retrieve(
    model: LanguageModel,
    tokenizer: Any,
    task: str,
    length: int,
    examples: int,
    seed: int,
    batch: int,
    cache: CachePolicy | None = None,
) -> dict[str, Any]:
    """Returns the score of a task of retrieval at one length, with all prompts, answers and continuations.

    Args:
      tokenizer: tokenizer of the run's task.
      examples: number of prompts.
      batch: number of prompts that are continued at once.
      cache: policy of the caches of attention.

    Raises:
      ValueError: if the length does not hold the task, or the model has no positions for it, or the policy cannot be used.
    """

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    prompts = retrieval_prompts.make_prompts(task, length=length, count=examples, seed=seed, tokens=tokens)
    new = SPARE + max(tokens(" and ".join(prompt.answers)) for prompt in prompts)
    outputs = []
    for start in range(0, examples, batch):
        group = prompts[start : start + batch]
        made = generate(
            model,
            [tokenizer.encode(prompt.text) for prompt in group],
            max_new_tokens=new,
            temperature=0.0,
            stop=[[tokenizer.end]],
            cache=cache,
        )
        outputs += [
            tokenizer.decode(row[:count]) for row, count in zip(made.tokens, made.lengths, strict=True)
        ]
    scores = [retrieval_prompts.score(*pair) for pair in zip(prompts, outputs, strict=True)]
    return dict(
        task=task,
        length=length,
        seed=seed,
        score=float(np.mean(scores)),
        examples=[
            dict(prompt=prompt.text, answers=list(prompt.answers), output=output, score=one)
            for prompt, output, one in zip(prompts, outputs, scores, strict=True)
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
