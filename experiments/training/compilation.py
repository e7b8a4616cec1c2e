"""Compilation of a function once per batch shape, ahead of use and in parallel."""

import concurrent.futures
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax


class PerShape:
    """A jitted function whose last argument is a batch (a dict of arrays), compiled once per batch shape.

    Attributes:
      compile_seconds: seconds of compilation so far.
    """

    def __init__(self, function: Callable[..., Any]):
        """Wraps `function`, the result of `jax.jit`."""
        self._function = function
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    def compile(self, *args: Any, batches: Iterable[Mapping[str, jax.ShapeDtypeStruct]]) -> None:
        """Compiles for `args` followed by each of `batches`; arrays may be passed as `jax.ShapeDtypeStruct`."""
        start = time.perf_counter()
        # Tracing holds Python's global lock, so only compilation gains from threads.
        lowered = {
            _shapes(batch): self._function.lower(*args, batch)
            for batch in batches
            if _shapes(batch) not in self._compiled
        }
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            compiled = pool.map(lambda entry: (entry[0], entry[1].compile()), lowered.items())
            self._compiled.update(compiled)
        self.compile_seconds += time.perf_counter() - start

    def __call__(self, *args: Any) -> Any:
        """Returns the result of the function, compiled first if the batch shape is new."""
        shapes = _shapes(args[-1])
        if shapes not in self._compiled:
            self.compile(*args[:-1], batches=[args[-1]])
        return self._compiled[shapes](*args)


def _shapes(batch: Mapping[str, Any]) -> Any:
    return tuple(sorted((name, array.shape) for name, array in batch.items()))
