"""The description that a primitive gives of itself to the shared tests and benchmarks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Draw = Callable[[np.random.Generator, int, int], dict[str, np.ndarray]]
WideDraw = Callable[[np.random.Generator, int, int, int], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call a primitive.

    Attributes:
      name: unique within the primitive.
      draw: `draw(rng, batch, time)` returns the array arguments by name, in float64 or complex128.
      options: the other keyword arguments.
      state: `state(rng, batch)` draws an initial state; None if this call has no state.
      segments: whether the call takes `segment_ids`.
      indexed: whether arguments name tokens by their index, which changes where a segment stands alone.
      tolerance: allowed relative error of float32 results (norm of the difference over the norm), where the
        conditioning of the case does not allow the shared one.
      tpu: whether the shared suite also runs kernels for TPUs on this case, which is slow under an interpreter.
    """

    name: str
    draw: Draw
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: Callable[[np.random.Generator, int], Any] | None = None
    segments: bool = True
    indexed: bool = False
    tolerance: float | None = None
    tpu: bool = False


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A call at a size where speed is compared.

    Attributes:
      name: as printed in the table.
      batch, time: sizes given to `draw`.
      draw: as in `Case`, with a last argument that divides the number of heads or channels.
      dtype: type of the inputs on the device.
      forward_bytes, backward_bytes: fewest bytes through device memory (each input read once, each output written once).
      forward_flops, backward_flops: arithmetic of the best known algorithm, each operation counted once.
      matrix_products: whether matrix units do the arithmetic.
      quadratic: whether the arithmetic grows with the square of time instead of linearly.
      options: as in `Case`.
    """

    name: str
    batch: int
    time: int
    draw: WideDraw
    dtype: str
    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int
    matrix_products: bool = True
    quadratic: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def resized(self, batch: int, time: int, narrower: int = 1) -> "Benchmark":
        """Returns the same call at another size, with `narrower` times fewer heads or channels and counts in proportion."""
        size = batch * time / (self.batch * self.time * narrower)
        work = size * (time / self.time if self.quadratic else 1)
        return dataclasses.replace(
            self,
            batch=batch,
            time=time,
            draw=lambda rng, batch, time, narrow=1: self.draw(rng, batch, time, narrow * narrower),
            forward_bytes=round(size * self.forward_bytes),
            backward_bytes=round(size * self.backward_bytes),
            forward_flops=round(work * self.forward_flops),
            backward_flops=round(work * self.backward_flops),
        )


@dataclasses.dataclass(frozen=True)
class Suite:
    """A primitive as the shared tests see it.

    Attributes:
      function: the public function. Returns `(output, final_state)` if it has states, else `output`.
      implementations: names that `impl` takes besides "reference".
      gpu_implementations: more names, which need a GPU.
      tpu_implementations: more names, which need a TPU or its interpreter; see `Case.tpu`.
      time_arguments: names of the arguments whose axis 1 is time.
      cases, benchmarks: see `Case` and `Benchmark`.
    """

    function: Callable[..., Any]
    implementations: tuple[str, ...]
    time_arguments: tuple[str, ...]
    cases: tuple[Case, ...]
    benchmarks: tuple[Benchmark, ...] = ()
    gpu_implementations: tuple[str, ...] = ()
    tpu_implementations: tuple[str, ...] = ()
