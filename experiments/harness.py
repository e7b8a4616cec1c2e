"""Evaluates the language model of a run on tasks of lm-evaluation-harness, from its work directory alone.

    pip install 'jax-seqmodels[eval]'
    python -m experiments.harness --workdir=runs/lm --tasks=lambada_openai,hellaswag --limit=200
    python -m experiments.harness --workdir=runs/lm --tasks=mine --include_path=tasks

Tasks are those that the library knows, which it may download, and those of YAML files in --include_path. Prints the library's
table, and writes the results with the tasks' configs to harness-STEP.json in the work directory. The first token of a text
without a context is predicted from the end of a document, or, where the run has kept documents apart, so that nothing
follows an end, from the end of a line. Exit codes: 0 done; 2 the run or an argument cannot be used; 65 a logit is not finite.

`make_lm` gives the model as the library's `LM`, for scripts that call the library themselves.
"""

import sys
from collections.abc import Sequence
from typing import Any

from experiments.analysis.requests import Requests
from experiments.config.command_line import (
    EXIT_DIVERGED,
    ArgumentError,
    Parser,
    positive_integer,
    reporting,
)
from experiments.runs.files import write_atomically
from experiments.training.trained import Trained, open_run


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates, prints and writes; returns the exit code."""
    args = _parser().parse_args(argv)
    library()
    import json

    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    manager = TaskManager(include_path=args.include_path)
    names = [name for name in args.tasks.split(",") if name]
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ArgumentError(
            f"--tasks={args.tasks}: lm-evaluation-harness has no task {unknown[0]!r}; --include_path names a folder of others"
        )
    if not names:
        raise ArgumentError("--tasks= is empty; expected names of tasks, separated by commas")
    trained = open_run(args.workdir, args.checkpoint)
    lm = make_lm(trained, batch=args.batch, limit=args.max_length)
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=manager.match_tasks(names),
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            task_manager=manager,
            log_samples=False,
        )
    except FloatingPointError as error:
        print(f"\n{error}", file=sys.stderr)
        return EXIT_DIVERGED
    print(make_table(found))
    kept = {name: found.get(name) for name in ("results", "versions", "n-shot", "n-samples", "configs")}
    record = dict(step=trained.step, lm_eval=lm_eval.__version__, limit=args.limit) | kept
    file = trained.run.folder / f"harness-{trained.step}.json"
    try:
        write_atomically(file, json.dumps(record, indent=2, default=handle_non_serializable) + "\n")
    except OSError as error:
        print(f"{file} cannot be written: {error.strerror}", file=sys.stderr)
    return 0


def _parser() -> Parser:
    parser = Parser("experiments.harness", __doc__, workdir=True)
    parser.add_argument("--tasks", required=True, help="names of tasks, separated by commas")
    parser.add_argument("--include_path", help="folder with YAML files of further tasks")
    parser.add_argument(
        "--checkpoint", default="best", help="best (of validation; the default), last, or a step"
    )
    parser.add_argument("--num_fewshot", type=int, help="examples in a prompt, in place of the task's")
    parser.add_argument("--limit", type=positive_integer, help="number of documents per task (default: all)")
    parser.add_argument(
        "--batch", type=positive_integer, default=8, help="texts that are read at once (default: 8)"
    )
    parser.add_argument(
        "--max_length",
        type=positive_integer,
        help="the most tokens that are read of a text (default: the model's table of positions, or any number)",
    )
    return parser


def library() -> Any:
    """Returns the class `LM` of lm-evaluation-harness.

    Raises:
      ArgumentError: it is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ArgumentError(
            f"lm-evaluation-harness is not installed ({error}): pip install 'jax-seqmodels[eval]'"
        ) from None
    return LM


def make_lm(trained: Trained, *, batch: int = 8, limit: int | None = None) -> Any:
    """Returns the model of a run as an `LM` of lm-evaluation-harness.

    Args:
      trained: see `open_run`.
      batch, limit: see `Requests`.

    Raises:
      ArgumentError: the library is not installed.
      ValueError: `limit` exceeds the table of positions.
    """
    tokenizer = trained.plan.task.tokenizer
    apart = trained.plan.config["task"].get("reset", True)
    prefix = tokenizer.encode("\n") if apart else [tokenizer.end]
    requests = Requests(trained.model, tokenizer, prefix=prefix, batch=batch, limit=limit)

    class RunLM(library()):
        """The model of a run."""

        def loglikelihood(self, instances: Sequence[Any]) -> list[tuple[float, bool]]:
            return requests.loglikelihood(instance.args for instance in instances)

        def loglikelihood_rolling(self, instances: Sequence[Any]) -> list[float]:
            return requests.loglikelihood_rolling(instance.args[0] for instance in instances)

        def generate_until(self, instances: Sequence[Any]) -> list[str]:
            return requests.generate_until(instance.args for instance in instances)

    return RunLM()
