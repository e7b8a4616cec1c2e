"""Functions of PyTorch tensors, such as Triton kernels, timed on the arrays that JAX functions are timed on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark.calls import Arrays, Compiled, split


@dataclasses.dataclass(frozen=True)
class TorchFunction:
    """A function of tensors by name that gives the output, made by `load` when it is needed."""

    load: Callable[[], Callable[..., Any]]

    def compiled(self, arrays: Arrays, cotangent: np.ndarray) -> Compiled:
        """Both passes, run once, so that nothing is left to compile. Memory is what PyTorch allocates, and the arguments."""
        passes = _Passes(self.load(), arrays, cotangent)
        arguments = sum(array.nbytes for array in arrays.values())
        forward_peak, _ = passes.measured(passes.forward)
        both_peak, _ = passes.measured(passes.both)
        return Compiled(
            lambda _: passes.forward(),
            lambda *_: passes.both(),
            arguments + forward_peak,
            arguments + cotangent.nbytes + both_peak,
        )

    def results(self, arrays: Arrays, cotangent: np.ndarray) -> tuple[np.ndarray, Arrays]:
        """The output and the gradients, as numpy arrays."""
        passes = _Passes(self.load(), arrays, cotangent)
        output, gradients = passes.both().values
        return _array(output), {name: _array(gradient) for name, gradient in gradients.items()}


class _Launched:
    """Results that may still be being computed; `jax.block_until_ready` waits for them."""

    def __init__(self, values: Any):
        self.values = values

    def block_until_ready(self) -> "_Launched":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


class _Passes:
    """Both passes of a function over copies of the arrays as tensors."""

    def __init__(self, function: Callable[..., Any], arrays: Arrays, cotangent: np.ndarray):
        differentiable, rest = split(arrays)
        self._function = function
        self._leaves = {name: _tensor(array).requires_grad_() for name, array in differentiable.items()}
        self._rest = {name: _tensor(array) for name, array in rest.items()}
        self._cotangent = _tensor(cotangent)

    def forward(self) -> _Launched:
        import torch

        with torch.no_grad():
            return _Launched(self._function(**self._leaves, **self._rest))

    def both(self) -> _Launched:
        import torch

        output = self._function(**self._leaves, **self._rest)
        gradients = torch.autograd.grad(output, list(self._leaves.values()), self._cotangent.to(output.dtype))
        return _Launched((output.detach(), dict(zip(self._leaves, gradients, strict=True))))

    def measured(self, run: Callable[[], _Launched]) -> tuple[int, _Launched]:
        """Bytes that a call allocates at the most, after one that compiles."""
        import torch

        run().block_until_ready()
        if not torch.cuda.is_available():
            return 0, run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        launched = run().block_until_ready()
        return torch.cuda.max_memory_allocated() - before, launched


def _tensor(array: np.ndarray) -> Any:
    import torch

    tensor = torch.from_dlpack(jax.device_put(array))
    return tensor.clone()


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(jax.dlpack.from_dlpack(tensor.detach().contiguous()))
