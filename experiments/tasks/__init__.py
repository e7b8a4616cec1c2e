"""Tasks by name. A task is data, loss and metrics; it does not know the model.

A task has `vocab_size`, `num_classes`, `splits` (name -> source, see `data.pipeline.Source`), `manifest`,
`loss(outputs, batch) -> (mean, sums)` and `baselines(split) -> accuracies`. To add one, write its class and name it in
`TASKS`; the keyword arguments of its constructor are its options.
"""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from experiments.tasks.listops import ListOps

TASKS = {"listops": ListOps}


def make_task(name: str, **options: Any) -> Any:
    """The task called `name`, made with `options`.

    Raises:
      ValueError: if there is no such task, or it does not know an option.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{_suggest(name, TASKS)}")
    known = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"task {name!r} has no option {option!r}{_suggest(option, known)}")
    return TASKS[name](**options)


def _suggest(given: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(known)}"
