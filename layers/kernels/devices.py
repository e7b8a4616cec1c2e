"""The device that kernels are chosen for: JAX's default device, or the one that `as_on` names."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax

Backend = Literal["cpu", "gpu", "tpu"]

_assumed: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("assumed", default=None)


@contextlib.contextmanager
def as_on(backend: Backend) -> Iterator[None]:
    """Context in which implementations are chosen as on one device of this kind: a CPU, a Hopper GPU or a TPU.

    For `jax.eval_shape` and for interpreters. The implementation chosen need not compile for the actual device.

    Raises:
      ValueError: `backend` is unknown.
    """
    if backend not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"backend={backend!r}; expected 'cpu', 'gpu' or 'tpu'")
    token = _assumed.set(backend)
    try:
        yield
    finally:
        _assumed.reset(token)


def assumed() -> Backend | None:
    """The backend that `as_on` names, or None outside it."""
    return _assumed.get()


def backend() -> str:
    """The kind of device that runs computations."""
    return _assumed.get() or jax.default_backend()


def count() -> int:
    """The number of devices over which arrays may lie if no mesh is set."""
    return 1 if _assumed.get() else jax.device_count()


def hopper_refusal() -> str | None:
    """Why the device is not a Hopper GPU, or None."""
    if _assumed.get() == "gpu":
        return None
    if backend() != "gpu":
        return f"it needs a Hopper GPU; JAX computes on {backend()}"
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0); {device.device_kind} has {capability}"
    return None
