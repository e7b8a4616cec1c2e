"""How a primitive describes itself to the shared tests and benchmarks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Draw = Callable[[np.random.Generator, int, int], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call a primitive.

    Attributes:
      name: unique within the primitive.
      draw: `draw(rng, batch, time)` returns the array arguments by name in float64 or complex128.
      options: the other keyword arguments.
      state: draws an initial state `state(rng, batch)`; None if this call has no state.
      segments: whether the call takes `segment_ids`.
      tolerance: allowed relative error of float32 results (norm of the difference over the norm) where the
        conditioning of the case does not allow the shared one.
    """

    name: str
    draw: Draw
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: Callable[[np.random.Generator, int], Any] | None = None
    segments: bool = True
    tolerance: float | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A case at the size where speed is compared.

    Attributes:
      name: as printed in the table.
      batch, time: sizes given to `draw`.
      draw, options: as in `Case`.
      dtype: type of the inputs on the device.
      forward_bytes, backward_bytes: fewest bytes through device memory (each input read once, each output written once).
      forward_flops, backward_flops: arithmetic of the best known algorithm, counted once.
    """

    name: str
    batch: int
    time: int
    draw: Draw
    dtype: str
    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A primitive as the shared tests see it.

    Attributes:
      function: the public function. Returns `(output, final_state)` if it has states, else `output`.
      implementations: names that `impl` takes besides "reference".
      time_arguments: names of the arguments whose axis 1 is time.
      cases, benchmarks: see there.
    """

    function: Callable[..., Any]
    implementations: tuple[str, ...]
    time_arguments: tuple[str, ...]
    cases: tuple[Case, ...]
    benchmarks: tuple[Benchmark, ...] = ()
