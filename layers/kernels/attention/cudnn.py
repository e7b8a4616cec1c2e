"""`attention` by cuDNN's fused kernels, through `jax.nn.dot_product_attention`, where they compute it exactly as defined."""

import jax
import jax.numpy as jnp

from layers.kernels import devices
from layers.kernels.attention import xla
from layers.kernels.attention.options import Options
from layers.kernels.segments import select_real

TAKEN = "causal, window, scale and segment_ids of rows that are not packed and end with their padding"


def attention(q, k, v, options):
    """Returns the output (b, t, h, v), and None for the log-sum-exp."""
    if devices.assumed():  # cuDNN cannot be traced where it is not installed
        return xla.attention(q, k, v, options)
    window, segments = options.mask.window, options.segment_ids
    lengths = None
    if segments is not None:
        lengths = segments.real.sum(1, dtype=jnp.int32)
        # The kernels multiply what stands at padding by zero, which leaves NaN where it is not finite.
        q, k, v = (select_real(x, segments) for x in (q, k, v))
    output = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=options.scale,
        is_causal=options.causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return select_real(output, segments), None


def refuses(q, k, v, options) -> str | None:
    """Why cuDNN cannot take this call, or None."""
    reason = _unknown_option(options)
    if reason is not None:
        return reason
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


def _unknown_option(options: Options) -> str | None:
    """Why the kernels do not compute what these options say, or None."""
    default = Options()
    for group in ("mask", "logits", "tokens"):
        for name, value in vars(getattr(options, group)).items():
            if name != "window" and value is not getattr(getattr(default, group), name):
                return f"it knows {TAKEN}, not {name}"
    window, segments = options.mask.window, options.segment_ids
    if window is not None and not options.causal:
        return "its window is causal; causal is False"
    if segments is not None and (segments.packed or segments.padding != "end"):
        return f"it knows {TAKEN}, not segment_ids of which less is known; `Segments.of` takes what is"
    return None


def _device() -> jax.Device:
    """The device where computations run by default."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen
