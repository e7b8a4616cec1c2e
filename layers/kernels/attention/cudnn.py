"""`attention` by cuDNN's fused kernels, where they compute it exactly as defined."""

import functools

import jax
import jax.numpy as jnp

from layers.kernels import devices, kept
from layers.kernels.attention import xla
from layers.kernels.attention.options import Options, beyond
from layers.kernels.partition import SEQUENCE_AXIS
from layers.kernels.segments import Segments, select_real
from layers.kernels.sequence_parallel import parts_of_time

TAKEN = "causal, window, scale and segment_ids whose padding ends the rows"
# The kernels keep a log-sum-exp per row for every segment that a row may hold.
MOST_SEGMENTS = 64


def attention(q, k, v, options):
    """Returns the output (b, t, h, v), and None for the log-sum-exp.

    `jax.nn.dot_product_attention` reaches the same kernels, but neither their segments nor values of another size than
    keys.
    """
    if devices.assumed():  # cuDNN cannot be traced where it is not installed
        return xla.attention(q, k, v, options)
    segments = options.segment_ids
    # The kernels multiply what stands at padding by zero, which leaves NaN where it is not finite.
    q, k, v = (select_real(x, segments) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    output = _attend((float(scale), options.causal, options.mask.window), q, k, v, *_where(segments))
    if segments is not None and segments.packed:
        output = jnp.where((segments.numbers > segments.most)[..., None, None], jnp.nan, output)
    return select_real(output, segments), None


def _where(segments: Segments | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Lengths of the segments of every row, and where they begin in it, as cuDNN takes them: -1 for no segment."""
    if segments is None:
        return None, None
    if not segments.packed:
        return segments.real.sum(1, dtype=jnp.int32), None
    numbers = jnp.arange(1, segments.most + 1)[None, None]
    lengths = (segments.numbers[..., None] == numbers).sum(1, dtype=jnp.int32)
    starts = jnp.where(lengths == 0, -1, jnp.cumsum(lengths, axis=1) - lengths)
    return jnp.where(lengths == 0, -1, lengths), jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


def batches_as_rows(function):
    """Returns `function` of arrays and trees of arrays, batched by making the new axis part of the first."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, *arguments):
        def rows(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = mapped(*jax.tree.map(rows, arguments, tuple(batched)))
        results = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return mapped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, lengths, starts):
    return forward(static, q, k, v, lengths, starts)[0]


def _kept_forward(static, q, k, v, lengths, starts):
    output, lse = kept.named(forward(static, q, k, v, lengths, starts))
    return output, (q, k, v, lengths, starts, lse, output)


def _backward(static, residuals, gradient):
    return *backward(static, *residuals, gradient), None, None


_attend.defvjp(_kept_forward, _backward)


def forward(static, q, k, v, lengths, starts):
    """Returns the output (b, t, h, v), and the log-sum-exp of the logits (b, h, t).

    Args:
      static: scale, whether the mask is causal by index, and its window or None.
      q, k, v: as `attention` takes them; t and s may differ without a mask.
      lengths, starts: what `_where` returns.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    scale, causal, window = static

    @batches_as_rows
    def run(q, k, v, lengths, starts):
        return tuple(
            fused.dot_product_attention(
                q,
                k,
                v,
                q_seqlen=lengths,
                kv_seqlen=lengths,
                q_offsets=starts,
                kv_offsets=starts,
                scale=scale,
                mask_type=_mask_type(causal, lengths),
                sliding_window_length=window,
                return_residual=True,
            )
        )

    return run(q, k, v, lengths, starts)


def backward(static, q, k, v, lengths, starts, lse, output, gradient):
    """Returns the gradients of q, k and v.

    With the output and the log-sum-exp of a softmax over more keys, they are the part that these keys have in its gradients.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    scale, causal, window = static

    @batches_as_rows
    def run(q, k, v, lengths, starts, lse, output, gradient):
        none = jnp.zeros(0, q.dtype)  # how cuDNN's calls spell None
        where = [none if x is None else x for x in (lengths, lengths, starts, starts)]
        residuals = (q, k, v, none, *where, none, none, lse, output)
        seed, dropout, bias, layout = 42, 0.0, (False, False), fused.AttentionLayout.BTNH.value
        kind = _mask_type(causal, lengths)
        return fused._dot_product_attention_bwd_rule(
            scale, seed, dropout, bias, kind, layout, window, True, False, residuals, gradient
        )[:3]

    return run(q, k, v, lengths, starts, lse, output, gradient)


def _mask_type(causal, lengths):
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    if lengths is None:
        return MaskType.CAUSAL if causal else MaskType.NO_MASK
    return MaskType.PADDING_CAUSAL if causal else MaskType.PADDING


def refuses(q, k, v, options) -> str | None:
    """Why cuDNN cannot take this call, or None."""
    if parts_of_time(q.shape[1]) > 1:
        return f"the mesh divides time over {SEQUENCE_AXIS!r}; the kernels need whole rows"
    return refuses_on_device(q, k, v, options)


def refuses_on_device(q, k, v, options) -> str | None:
    """Why cuDNN cannot take this call where a device holds whole rows, or None."""
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
    sizes = q.shape[3], v.shape[3]
    if any(size % 8 or size > largest for size in sizes):
        return f"it takes heads of a multiple of 8 up to {largest}; those of k and v are {sizes[0]} and {sizes[1]}"
    packed = options.segment_ids is not None and options.segment_ids.packed
    if capability < (9, 0):
        if sizes[0] != sizes[1]:
            return f"it takes heads of one size for k and v below compute capability 9.0; they are {sizes[0]} and {sizes[1]}"
        if packed:
            return "it takes packed rows from compute capability 9.0"
    if packed and sizes[0] != sizes[1]:
        return f"it takes heads of one size for k and v in packed rows; they are {sizes[0]} and {sizes[1]}"
    return None


def _unknown_option(options: Options) -> str | None:
    """Why the kernels do not compute what these options say, or None."""
    if (name := beyond(options, ("window",))) is not None:
        return f"it knows {TAKEN}, not {name}"
    window, segments = options.mask.window, options.segment_ids
    if window is not None and not options.causal:
        return "its window is causal; causal is False"
    if segments is None:
        return None
    if segments.padding != "end":
        return f"it knows {TAKEN}; `Segments.of(segment_ids, padding='end')` says that it does"
    if segments.most is None or segments.most > MOST_SEGMENTS:
        known = "an unknown number" if segments.most is None else segments.most
        return (
            f"it takes rows of at most {MOST_SEGMENTS} segments, and these hold {known}; "
            "`Segments.of(segment_ids, packed=...)` takes the most of a row"
        )
    return None


def _device() -> jax.Device:
    """The device where computations run by default."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen
