"""Model FLOPs utilization: the share of a device's peak arithmetic that the matrix products of a model take.

    MFU = F tokens / (seconds P)     F: FLOPs of a token, P: peak of all devices

F counts each matrix product three times, once for the forward pass and twice for its gradients (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B). What the backward pass computes again and elementwise operations do not count.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from experiments.analysis.flops import count_flops
from experiments.training.model import SplitModel
from layers.kernels import devices, dispatch

# Dense bfloat16 FLOP/s by the start of `device_kind`, from the vendors' data sheets; longer names first.
PEAKS: dict[str, float] = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v4": 275e12,
}


class Utilization:
    """Counts the FLOPs of training steps, and compares them with the peak of the devices.

    Attributes:
      peak: peak bfloat16 FLOP/s of all devices, or None if the kind of one is not in `PEAKS`; then nothing is counted.
    """

    def __init__(self, model: SplitModel, loss: Callable[..., Any], kinds: Iterable[str]):
        """Counts nothing yet.

        Args:
          loss: loss of the task, whose matrix products count too.
          kinds: `device_kind` of each device.
        """
        self._model, self._loss = model, loss
        self.peak = peak_flops(kinds)
        self._known: dict[Any, float] = {}

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Returns the FLOPs of a step on a batch, of which only the shapes matter; 0 without a known peak."""
        if self.peak is None:
            return 0.0
        shapes = tuple((name, array.shape) for name, array in batch.items())
        if shapes not in self._known:
            self._known[shapes] = training_flops(self._model, self._loss, batch)
        return self._known[shapes]


def peak_flops(kinds: Iterable[str]) -> float | None:
    """Returns the peak bfloat16 FLOP/s of devices of these kinds together, or None if one is not in `PEAKS`."""
    found = [next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None) for kind in kinds]
    return None if None in found else sum(found)


def training_flops(model: SplitModel, loss: Callable[..., Any], batch: Mapping[str, Any]) -> float:
    """Returns the FLOPs of a training step on a batch: three times those of the forward pass's matrix products.

    If only adapters are trained, it is twice those. They are counted on the plain JAX form of the model, since kernels hide
    theirs; attention counts all pairs of positions, as is usual.

    Args:
      model: model of the step.
      loss: loss of the task, whose matrix products count too.
      batch: arrays or their shapes.
    """

    def shapes(declarations):
        return {name: jax.ShapeDtypeStruct(d.shape, d.dtype) for name, d in declarations.items()}

    def forward(parameters, statistics, batch):
        return loss(model(parameters, statistics, batch, key=None)[0], batch)[0]

    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
    # Matrices that adapters are trained beside have no gradient.
    passes = 2 if model.frozen else 3
    with devices.as_on("cpu"), dispatch.explained():
        return (
            passes * count_flops(forward, shapes(model.parameters), shapes(model.statistics), abstract).matrix
        )


def peak_memory(device: jax.Device) -> int | None:
    """Returns the most bytes in use on a device so far, or None where it does not count them."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
