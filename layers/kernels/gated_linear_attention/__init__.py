"""S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T: linear attention with decay, from RetNet to Mamba-2, GLA and RWKV-6."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.gated_linear_attention import gpu, reference, tpu, xla
from layers.kernels.isolation import isolated
from layers.kernels.segments import SegmentIds, select_real
from layers.kernels.sequence_parallel import Recurrence
from layers.typing import Array, Float

__all__ = ["SMALLEST_DENOMINATOR", "Piece", "compose", "gated_linear_attention", "summarize"]

SERIES, READERS = ("q", "k", "v", "log_decay"), ("q",)
IMPLEMENTATIONS = {
    "gpu": Implementation(gpu.gated_linear_attention, gpu.unsupported_reason, gpu.passed_over_reason, "gpu"),
    "tpu": Implementation(tpu.gated_linear_attention, tpu.unsupported_reason, tpu.passed_over_reason, "tpu"),
    "xla": Implementation(isolated(xla.gated_linear_attention, *SERIES, readers=READERS)),
    "reference": Implementation(
        isolated(reference.gated_linear_attention, *SERIES, readers=READERS),
        passed_over_reason=by_name_only,
        forward_mode=True,
    ),
}

# A denominator nearer to 0 than this is replaced by it, with its sign kept.
SMALLEST_DENOMINATOR = 1e-6

LogDecay = Float[Array, "h"] | Float[Array, "#b #t h"] | Float[Array, "#b #t h k"]


def gated_linear_attention(
    q: Float[Array, "b t hq k"],
    k: Float[Array, "b t hk k"],
    v: Float[Array, "b t hv v"],
    *,
    log_decay: LogDecay | None = None,
    bonus: Float[Array, "h k"] | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Float[Array, "b h k s"] | None = None,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k s"]]:
    """Returns the outputs of linear attention with decay, and its matrix state after the last token.

    With alpha_t = exp(log_decay_t), per head

        S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t,

    or with a bonus u, which reads the state before the step,

        o_t = scale (S_{t-1} + Diag(u) k_t v_t^T)^T q_t.

    With `normalize` the weights of the values are divided by their sum: z_t, the sum of keys decayed as S_t is (and
    with the bonus read as S_t is), gives o_t = S_t^T q_t / (z_t^T q_t). A denominator between -1e-6 and 1e-6 becomes
    -1e-6 if negative, else 1e-6, so that zero queries give zero; useful features of queries and keys are positive.

    Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): no decay. RetNet (Sun et al. 2023,
    arXiv:2307.08621), Lightning Attention (Qin et al. 2024, arXiv:2401.04658): one fixed decay per head. Mamba-2 (Dao
    and Gu 2024, arXiv:2405.21060): one decay per head and step, q = C, k = B, v = dt x. GLA (Yang et al. 2023,
    arXiv:2312.06635), HGRN2 (Qin et al. 2024, arXiv:2404.07904): a decay per key channel. RWKV-5 and RWKV-6 (Peng et
    al. 2024, arXiv:2404.05892): a decay per key channel and the bonus.

    Forward-mode differentiation (jax.jvp, jax.hessian) needs impl="reference"; reverse mode has no such limit.

    Args:
      q, k, v: queries, keys and values. Any of them may have fewer heads than the largest count h; head i of h then uses
        head i // (h / heads). Their types may differ; matrix units are fast where all three are bfloat16.
      log_decay: natural logarithm of the decay, at most 0; positive numbers are refused if known, and NaN in outputs of
        compiled code. None: no decay. (h): fixed. (b, t, h): per head and
        step. (b, t, h, k): per key channel. A size of 1 in place of b or t stands for all.
      bonus: (h, k), the weight u of the current token.
      scale: factor of the outputs, k ** -0.5 if None. Must be None with `normalize`.
      normalize: whether to divide the outputs by the sum of the weights.
      initial_state: S_0, zero if None; it belongs to the first real token.
      segment_ids: (b, t). 0 is padding, which leaves the state as it is and has zero outputs; a change of id resets the
        state (see `layers.kernels.segments`).
      impl: "gpu" (bfloat16; with a decay per key channel not normalised, and heads of at most 512), "tpu" (at most one decay per head
        and step, with no bonus and not normalised),
        "xla", "reference", or None for the best.

    Returns:
      o: (b, t, h, v), in the type of v.
      final_state: (b, h, k, v), float32 or wider; (b, h, k, v + 1) with `normalize`, the last column being z.

    Raises:
      ValueError, TypeError: a shape, type, sign, `scale` or `impl` does not fit; the message names the argument.
    """
    sizes, segments = _check(q=q, k=k, v=v, log_decay=log_decay, segment_ids=segment_ids)
    log_decay = checks.not_positive("log_decay", log_decay, checks.LOGARITHM)
    checks.check_real(bonus=bonus, initial_state=initial_state)
    if bonus is not None:
        _raise_heads(bonus, 0, sizes)
        checks.check_shape("bonus", bonus, "h k", sizes)
    state_shape = (sizes["b"], sizes["h"], sizes["k"], sizes["v"] + int(normalize))
    if initial_state is not None and initial_state.shape != state_shape:
        columns = "v + 1" if normalize else "v"
        raise ValueError(
            f"initial_state has shape {initial_state.shape}; expected (b, h, k, {columns}) = {state_shape}"
        )
    if normalize and scale is not None:
        raise ValueError(f"scale={scale} has no effect with normalize=True; leave it out")
    if sizes["t"] == 0:
        dtype = checks.accumulation_dtype(q, k, v, log_decay, bonus, initial_state)
        state = jnp.zeros(state_shape, dtype) if initial_state is None else initial_state.astype(dtype)
        return jnp.zeros((sizes["b"], 0, sizes["h"], sizes["v"]), v.dtype), state
    o, final = dispatch(
        "gated_linear_attention",
        IMPLEMENTATIONS,
        impl,
        over_time=OVER_TIME,
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        bonus=bonus,
        scale=sizes["k"] ** -0.5 if scale is None else scale,
        normalize=normalize,
        initial_state=initial_state,
        segments=segments,
        smallest=SMALLEST_DENOMINATOR,
    )
    return o.astype(v.dtype), final


class Piece(NamedTuple):
    """The effect of consecutive tokens on the state: S -> decay * S + state."""

    decay: jax.Array
    state: jax.Array


def summarize(
    k: Float[Array, "b t hk k"],
    v: Float[Array, "b t hv v"],
    *,
    log_decay: LogDecay | None = None,
    normalize: bool = False,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> Piece:
    """Returns the effect of consecutive tokens: decay (b, h, k or 1, 1) and state (b, h, k, v or v + 1).

    The first real token continues the segment before it; where it begins another segment, the caller sets `decay` to
    zero. The number of heads is the largest of those of k, v and log_decay. A bonus does not change the effect.
    """
    sizes, segments = _check(k=k, v=v, log_decay=log_decay, segment_ids=segment_ids)
    log_decay = checks.not_positive("log_decay", log_decay, checks.LOGARITHM)
    dtype = checks.accumulation_dtype(k, v, log_decay)
    shape = sizes["b"], sizes["t"], sizes["h"]
    total = jnp.zeros((*shape[::2], 1), dtype)
    if log_decay is not None:
        every = log_decay[None, None] if log_decay.ndim == 1 else log_decay
        every = every[..., None] if every.ndim == 3 else every
        every = jnp.broadcast_to(every.astype(dtype), (*shape, every.shape[-1]))
        every = select_real(every, segments)
        total = every.sum(1)
    decay = jnp.exp(total)[..., None]
    if segments is not None and segments.packed:
        forgotten = segments.starts.any(1)
        decay = jnp.where(forgotten[:, None, None, None], 0, decay)
    _, state = gated_linear_attention(
        k, k, v, log_decay=log_decay, normalize=normalize, segment_ids=segments, impl=impl
    )
    return Piece(decay, state)


def compose(first: Piece, second: Piece) -> Piece:
    """Returns the effect of `first` followed by `second`. Associative; the identity is Piece(1, 0)."""
    return Piece(second.decay * first.decay, second.decay * first.state + second.state)


def _check(*, k, v, log_decay, segment_ids, q=None):
    """Checks what `gated_linear_attention` and `summarize` share; returns the sizes b, t, k, v and h, and `Segments`."""
    inputs = {name: x for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    checks.check_real(**inputs, log_decay=log_decay)
    sizes: dict[str, int] = {}
    for name, x in inputs.items():
        checks.check_shape(name, x, f"b t h_{name} {'v' if name == 'v' else 'k'}", sizes)
    checks.check_features(k=k)
    counts = {name: sizes.pop(f"h_{name}") for name in inputs}
    sizes["h"] = max(counts.values())
    if log_decay is not None:
        rank = log_decay.ndim
        patterns = {1: "h", 3: "b|1 t|1 h", 4: "b|1 t|1 h k"}
        if rank not in patterns:
            raise ValueError(
                f"log_decay has shape {log_decay.shape}; expected (h,), (b, t, h) or (b, t, h, k) with {sizes}"
            )
        _raise_heads(log_decay, 0 if rank == 1 else 2, sizes)
        checks.check_shape("log_decay", log_decay, patterns[rank], sizes)
    for name, count in counts.items():
        if count == 0 or sizes["h"] % count:
            raise ValueError(
                f"{name} has {count} heads; expected a count that divides the largest, {sizes['h']}"
            )
    return sizes, checks.check_segment_ids(segment_ids, sizes)


def _raise_heads(x, axis, sizes):
    """Lets `x` raise the number of heads: queries, keys and values may all be shared."""
    if x.ndim > axis:
        sizes["h"] = max(sizes["h"], x.shape[axis])


def _piece(arguments, segments, impl):
    """The piece with the heads of the state: queries and the bonus may have more than `summarize` sees."""
    names = "k", "v", "log_decay", "normalize"
    piece = summarize(**{name: arguments[name] for name in names}, segment_ids=segments, impl=impl)
    q, bonus = arguments["q"], arguments["bonus"]
    heads = max(piece.state.shape[1], q.shape[2], 0 if bonus is None else bonus.shape[0])
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, heads // leaf.shape[1], axis=1), piece)


OVER_TIME = Recurrence(
    axes=dict.fromkeys(("q", "k", "v"), ("b t h k",))
    | {"log_decay": ("h", "b t h", "b t h k"), "bonus": ("h k",), "initial_state": ("b h k v",)},
    outputs="b t h v",
    state="b h k v",
    summarize=_piece,
    compose=compose,
)
