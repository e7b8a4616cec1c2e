"""Functions of PyTorch tensors, such as Triton kernels, timed on the same arrays as JAX functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark.calls import Arrays, Compiled, split


@dataclasses.dataclass(frozen=True)
class TorchFunction:
    """A function from tensors by name to the output, created by `load` when it is needed."""

    load: Callable[[], Callable[..., Any]]

    def compiled(self, arrays: Arrays, cotangent: np.ndarray) -> Compiled:
        """Returns both passes, compiled by one run each. Memory is PyTorch's allocations plus the arguments."""
        function = self.load()
        passes = _Passes(function, *jax.device_put((arrays, cotangent)))
        arguments = sum(array.nbytes for array in arrays.values())
        forward, both = _peak_bytes(passes.forward), _peak_bytes(passes.both)
        _give_back()
        return Compiled(
            # Tensors are views of JAX's arrays, created per call, so that none outlives its study.
            lambda arrays: _Passes(function, arrays).forward(),
            lambda arrays, cotangent: _Passes(function, arrays, cotangent).both(),
            arguments + forward,
            arguments + cotangent.nbytes + both,
        )

    def results(self, arrays: Arrays, cotangent: np.ndarray) -> tuple[np.ndarray, Arrays]:
        """Returns the output and the gradients as NumPy arrays."""
        passes = _Passes(self.load(), *jax.device_put((arrays, cotangent)))
        output, gradients = passes.both().block_until_ready().values
        results = _array(output), {name: _array(gradient) for name, gradient in gradients.items()}
        del output, gradients
        _give_back()
        return results


class _Launched:
    """Results that PyTorch may not have computed yet; `jax.block_until_ready` waits for them."""

    def __init__(self, values: Any):
        self.values = values

    def block_until_ready(self) -> "_Launched":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


class _Passes:
    """Both passes of a function over JAX's arrays as tensors."""

    def __init__(self, function: Callable[..., Any], arrays: Arrays, cotangent: jax.Array | None = None):
        import torch

        differentiable, rest = split(arrays)
        self._function, self._cotangent = function, cotangent
        self._leaves = {
            name: torch.from_dlpack(array).requires_grad_() for name, array in differentiable.items()
        }
        self._rest = {name: torch.from_dlpack(array) for name, array in rest.items()}

    def forward(self) -> _Launched:
        import torch

        with torch.no_grad():
            return _Launched(self._function(**self._leaves, **self._rest))

    def both(self) -> _Launched:
        import torch

        output = self._function(**self._leaves, **self._rest)
        cotangent = torch.from_dlpack(self._cotangent).to(output.dtype)
        gradients = torch.autograd.grad(output, list(self._leaves.values()), cotangent)
        return _Launched((output.detach(), dict(zip(self._leaves, gradients, strict=True))))


def _peak_bytes(run: Callable[[], _Launched]) -> int:
    """Returns the peak allocation of a call, after one that compiles."""
    import torch

    run().block_until_ready()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run().block_until_ready()
    return torch.cuda.max_memory_allocated() - before


def _give_back() -> None:
    """Releases PyTorch's cached memory to the GPU, which other processes share."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(jax.dlpack.from_dlpack(tensor.detach().contiguous()))
