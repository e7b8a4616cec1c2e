"""How to run: data, tasks, training, evaluation and benchmarks."""

import importlib.util
from pathlib import Path

_layers = importlib.util.find_spec("layers")
if _layers is None or _layers.origin != str(Path(__file__).parents[1] / "layers" / "__init__.py"):
    import seqmodels  # noqa: F401  raises an error that names what stands in the way, if anything does
