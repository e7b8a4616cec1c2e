"""`attention` by cuDNN's fused kernels, through `jax.nn.dot_product_attention`, for what they compute exactly as defined."""

import jax
import jax.numpy as jnp

from layers.kernels import devices
from layers.kernels.attention import xla
from layers.kernels.attention.options import Options

TAKEN = ("causal", "window", "scale")


def attention(q, k, v, options):
    """The output (b, t, h, v), and None for the log-sum-exp."""
    if devices.assumed():  # cuDNN cannot be traced where it is not installed
        return xla.attention(q, k, v, options)
    o = options
    output = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=o.scale,
        is_causal=o.causal,
        local_window_size=None if o.window is None else (o.window - 1, 0),
        implementation="cudnn",
    )
    return output, None


def refuses(q, k, v, options) -> str | None:
    """Why cuDNN cannot take this call, or None."""
    default = Options()
    for name in Options._fields:
        if name not in TAKEN and getattr(options, name) is not getattr(default, name):
            return f"it knows {', '.join(TAKEN)}, not {name}"
    if options.window is not None and not options.causal:
        return "its window is causal; causal is False"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"it takes q, k and v all bfloat16 or all float16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[1] % 2 or k.shape[1] % 2:
        return f"its gradients need even lengths; they are {q.shape[1]} and {k.shape[1]}"
    if devices.assumed() == "gpu":
        capability = (9, 0)
    else:
        device = _device()
        if device.platform != "gpu" or "cuda" not in device.client.platform_version:
            return f"it needs an NVIDIA GPU; the device is {device.device_kind}"
        capability = tuple(map(int, device.compute_capability.split(".")))
        if capability < (8, 0):
            return f"it needs compute capability 8.0; {device.device_kind} has {device.compute_capability}"
    largest = 256 if capability >= (9, 0) else 128
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > largest:
        return f"it takes heads of one size for k and v, a multiple of 8 up to {largest}; they are {q.shape[3]} and {v.shape[3]}"
    return None


def _device() -> jax.Device:
    """Where computations run unless told otherwise."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen
