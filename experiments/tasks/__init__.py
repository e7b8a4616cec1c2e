"""Tasks by name; `Task` defines what a task is.

To add a task, write a class that inherits from `Task` and name it in `TASKS`. The keyword arguments of its constructor are
the options of the section `task`.
"""

import inspect
import os
from collections.abc import Iterable
from typing import Any

from experiments.tasks.aan import AAN
from experiments.tasks.chorales import ChoraleEvents, Chorales
from experiments.tasks.cifar10 import CIFAR10
from experiments.tasks.emails import Emails
from experiments.tasks.forecasting import Forecasting
from experiments.tasks.imdb import IMDB
from experiments.tasks.language import LanguageModeling
from experiments.tasks.listops import ListOps
from experiments.tasks.masked import MaskedLanguageModeling
from experiments.tasks.mnist import MNIST
from experiments.tasks.oscillations import IrregularOscillations
from experiments.tasks.packages import PackagePairs, PackageText
from experiments.tasks.pathfinder import Pathfinder
from experiments.tasks.proteins import Proteins
from experiments.tasks.species import Species
from experiments.tasks.speech_commands import SpeechCommands
from experiments.tasks.synthetic.algorithms import Addition, Copy, Parity, Sorting
from experiments.tasks.synthetic.associative_recall import AssociativeRecall
from experiments.tasks.synthetic.hints import HintedAddition, HintedSorting
from experiments.tasks.synthetic.induction_heads import InductionHeads
from experiments.tasks.synthetic.linear_regression import LinearRegression
from experiments.tasks.synthetic.mad_memory import Compression, MADSelectiveCopying, Memorization
from experiments.tasks.synthetic.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from experiments.tasks.synthetic.mqar import MQAR
from experiments.tasks.synthetic.pointing import ConvexHull, PointerSorting
from experiments.tasks.synthetic.rasp import Counting, Mode, UniqueCopy
from experiments.tasks.synthetic.regular_languages import RegularLanguages
from experiments.tasks.synthetic.selective_copying import SelectiveCopying
from experiments.tasks.synthetic.source_target import SourceCopy, SourceSorting
from experiments.tasks.synthetic.word_problem import WordProblem
from experiments.tasks.task import Task
from layers.registry import suggestion

FOLDER = str | os.PathLike | None

TASKS: dict[str, type[Task]] = {
    "aan": AAN,
    "addition": Addition,
    "addition_hints": HintedAddition,
    "associative_recall": AssociativeRecall,
    "chorale_events": ChoraleEvents,
    "chorales": Chorales,
    "cifar10": CIFAR10,
    "convex_hull": ConvexHull,
    "copy": Copy,
    "copy_source": SourceCopy,
    "copy_unique": UniqueCopy,
    "count": Counting,
    "emails": Emails,
    "forecasting": Forecasting,
    "imdb": IMDB,
    "induction_heads": InductionHeads,
    "language": LanguageModeling,
    "linear_regression": LinearRegression,
    "listops": ListOps,
    "mad_compression": Compression,
    "mad_fuzzy_recall": FuzzyRecall,
    "mad_in_context_recall": InContextRecall,
    "mad_memorization": Memorization,
    "mad_noisy_recall": NoisyRecall,
    "mad_selective_copying": MADSelectiveCopying,
    "masked_language": MaskedLanguageModeling,
    "mnist": MNIST,
    "mode": Mode,
    "mqar": MQAR,
    "oscillations": IrregularOscillations,
    "package_pairs": PackagePairs,
    "package_text": PackageText,
    "parity": Parity,
    "pathfinder": Pathfinder,
    "proteins": Proteins,
    "regular_languages": RegularLanguages,
    "selective_copying": SelectiveCopying,
    "sorting": Sorting,
    "sorting_hints": HintedSorting,
    "sorting_pointers": PointerSorting,
    "sorting_source": SourceSorting,
    "species": Species,
    "speech_commands": SpeechCommands,
    "word_problem": WordProblem,
}


def make_task(name: str, **options: Any) -> Task:
    """Returns the task called `name`, created with `options`.

    Raises:
      ValueError: if there is no such task, or it has no such option.
      TypeError: if an option that names a folder is no path.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{_suggest(name, TASKS)}")
    known = inspect.signature(TASKS[name]).parameters
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"task {name!r} has no option {option!r}{_suggest(option, known)}")
        if known[option].annotation == FOLDER and not isinstance(value, FOLDER):
            raise TypeError(f"task.{option}={value!r}; expected the path of a folder or None")
    return TASKS[name](**options)


def _suggest(given: str, known: Iterable[str]) -> str:
    known = list(known)
    return suggestion(given, known) or f"; choose from {', '.join(known)}"
