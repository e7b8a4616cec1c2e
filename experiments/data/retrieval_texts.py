"""Texts of retrieval with their answers, to train on: `python -m experiments.data.retrieval_texts --out=retrieval.jsonl`.

    python -m experiments.data.retrieval_texts --out=data/retrieval.jsonl --length=4096 --count=20000

A JSON line per text: a prompt of `experiments.data.retrieval_prompts` and its answers behind it. Lengths are uniform in their logarithm
from an eighth of --length on, so that short prompts, which are learned first, are among them. Seeds are those that no measurement
takes. Exit codes: 0 done; 2 an argument cannot be used.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence

from experiments.config.command_line import ArgumentError, Parser, names, path, positive_integer, reporting
from experiments.data.retrieval_prompts import TASKS, make_prompts
from experiments.runs.files import write_atomically
from layers.registry import suggestion

SEED = 1_000_000
SHORTEST = 8  # of --length


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the texts and returns the exit code."""
    parser = Parser("experiments.data.retrieval_texts", __doc__)
    parser.add_argument("--out", type=path, required=True, help="file of JSON lines")
    parser.add_argument(
        "--length", type=positive_integer, default=4096, help="most bytes of a prompt (default: 4096)"
    )
    parser.add_argument(
        "--count", type=positive_integer, default=20000, help="number of texts (default: 20000)"
    )
    parser.add_argument(
        "--tasks",
        type=names,
        default=("passkey", "niah_single", "niah_multikey", "variable_tracking"),
        help=f"of {', '.join(TASKS)} (default: passkey, niah_single, niah_multikey, variable_tracking)",
    )
    args = parser.parse_args(argv)
    for task in args.tasks:
        if task not in TASKS:
            raise ArgumentError(f"--tasks={task}{suggestion(task, TASKS)}; expected {', '.join(TASKS)}")
    lines = [json.dumps(dict(text=text)) for text in texts(args.tasks, args.length, args.count)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, "\n".join(lines) + "\n")
    print(f"{args.out}: {len(lines)} texts of up to {args.length} bytes")
    return 0


def texts(tasks: Sequence[str], length: int, count: int) -> Iterator[str]:
    """Yields prompts with their answers.

    Raises:
      ValueError: the length does not hold the facts and the question of a task.
    """
    chance = random.Random(SEED)
    for number in range(count):
        size = int(length * SHORTEST ** -chance.random())
        task = tasks[number % len(tasks)]
        (prompt,) = make_prompts(task, length=size, count=1, seed=SEED + number, tokens=_bytes)
        yield f"{prompt.text} {' and '.join(prompt.answers)}."


def _bytes(text: str) -> int:
    return len(text.encode())


if __name__ == "__main__":
    sys.exit(main())
