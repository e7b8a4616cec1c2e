"""The delta rule with no, scalar or per-channel decay, and the diagonal-plus-low-rank rule: DeltaNet, KDA, RWKV-7."""

import dataclasses

import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.delta_rule import gpu, reference, tpu, xla
from layers.kernels.delta_rule.piece import Piece, compose
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.isolation import isolated
from layers.kernels.mixed_precision import operand_dtype, product
from layers.kernels.promotion import promoting
from layers.kernels.segments import SegmentIds
from layers.kernels.sequence_parallel import Recurrence
from layers.kernels.shard_map_types import vary_as
from layers.typing import Array, Float

__all__ = ["Piece", "compose", "delta_rule", "dplr_delta_rule", "summarize", "summarize_dplr"]

SERIES = "q", "k", "v", "beta", "log_decay"
READERS = ("q",)
DPLR_SERIES = "q", "k", "v", "a", "b", "log_decay"
DELTA_RULE = {
    "gpu": Implementation(
        gpu.delta_rule, gpu.unsupported_reason, gpu.passed_over_reason, "gpu", across=gpu.delta_rule_across
    ),
    "tpu": Implementation(tpu.delta_rule, tpu.unsupported_reason, tpu.passed_over_reason, "tpu"),
    "xla": Implementation(isolated(xla.delta_rule, *SERIES, readers=READERS)),
    "reference": Implementation(
        isolated(reference.delta_rule, *SERIES, readers=READERS),
        passed_over_reason=by_name_only,
        forward_mode=True,
    ),
}
DPLR_DELTA_RULE = {
    "gpu": Implementation(
        gpu.dplr_delta_rule, gpu.dplr_unsupported_reason, gpu.dplr_passed_over_reason, "gpu"
    ),
    "xla": Implementation(isolated(xla.dplr_delta_rule, *DPLR_SERIES, readers=READERS)),
    "reference": Implementation(
        isolated(reference.dplr_delta_rule, *DPLR_SERIES, readers=READERS),
        passed_over_reason=by_name_only,
        forward_mode=True,
    ),
}


def delta_rule(
    q: Float[Array, "b t g k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t h v"],
    beta: Float[Array, "b t h"],
    *,
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Array, "b h k v"] | None = None,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Returns the outputs of the delta rule, which corrects what the state holds at a key, and the last state.

        S' = Diag(alpha_t) S_{t-1}                         decay first,
        S_t = S' + beta_t k_t (v_t - S'^T k_t)^T           then erase and write,
        o_t = scale S_t^T q_t,

    that is S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T with alpha = exp(log_decay). DeltaNet
    (Yang et al. 2024, arXiv:2406.06484) has no decay, Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464) one per head,
    Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692) one per key channel.

    Forward-mode differentiation (jax.jvp, jax.hessian) needs impl="reference"; reverse mode has no such limit.

    Args:
      q, k: queries and keys. They may have fewer heads than v: head j of v uses head j // (h / g) of q and k. beta |k|^2
        must not exceed 2, or the state diverges; keys should have a norm of about 1 or less.
      v: values.
      beta: writing strength, in (0, 1), or in (0, 2) to let a step reverse the sign of what it erases.
      log_decay: log alpha <= 0, per head (b, t, h) or key channel (b, t, h, k); None for no decay. Positive numbers are
        refused if known, and NaN in outputs of compiled code.
      scale: factor of the queries; k^-1/2 if None.
      normalize_qk: whether to divide queries and keys by their norms first, x / sqrt(sum x^2 + 1e-6), in float32.
      initial_state: S_0, zero if None. It belongs to the segment of the first real token.
      segment_ids: 0 is padding, which leaves the state as it is and outputs zero; a change of id resets the state
        (see `layers.kernels.segments`).
      impl: "gpu", "tpu", "xla", "reference", or None for the best. "gpu", for Hopper, takes bfloat16 values, and bfloat16 queries
        and keys of at most 128 features per head. "tpu" takes at most one decay per head and step.

    Returns:
      o: (b, t, h, v) in the type of v.
      final_state: (b, h, k, v), the state after the last step, float32 or wider.

    Raises:
      ValueError, TypeError: a shape, type, sign or `impl` does not fit; the message names the argument.
    """
    sizes: dict[str, int] = {}
    checks.check_real(q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state)
    checks.check_shape("q", q, "b t g k", sizes)
    checks.check_shape("k", k, "b t g k", sizes)
    checks.check_shape("v", v, "b t h v", sizes)
    checks.check_shape("beta", beta, "b t h", sizes)
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        raise ValueError(
            f"q and k have {sizes['g']} heads, v has {sizes['h']}; expected a number that divides the heads of v"
        )
    return _checked(
        "delta_rule",
        DELTA_RULE,
        impl,
        sizes,
        {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay},
        {"scale": scale, "normalize_qk": normalize_qk},
        initial_state,
        segment_ids,
        OVER_TIME,
    )


def dplr_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    *,
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Returns the outputs and last state of the general delta rule, whose transition is diagonal plus low-rank.

        S_t = Diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = scale S_t^T q_t,

    with w = exp(log_decay); both terms read the old state. RWKV-7 (Peng et al. 2025, arXiv:2503.14456) is a = -kappa,
    b = eta kappa for the removal key kappa and the learning rate eta, with scale = 1. `delta_rule` is a = alpha k,
    b = -beta k and beta k in place of k, and costs about half as much. Forward-mode differentiation needs impl="reference".

    Args:
      q, k, v: queries, keys and values.
      a: the direction in which the old state is read.
      b: the direction in which that is written; Diag(w) + b a^T should not lengthen vectors, or the state diverges.
      log_decay: log w <= 0, per head (b, t, h) or key channel (b, t, h, k); None for no decay. As for `delta_rule`.
      scale: factor of the queries; k^-1/2 if None.
      initial_state, segment_ids: as for `delta_rule`.
      impl: "gpu", "xla", "reference", or None for the best. "gpu", for Hopper, takes what it takes of
        `delta_rule`, and b and a in bfloat16.

    Returns:
      o: (b, t, h, v) in the type of v.
      final_state: (b, h, k, v), the state after the last step, float32 or wider.

    Raises:
      ValueError, TypeError: a shape, type, sign or `impl` does not fit; the message names the argument.
    """
    sizes: dict[str, int] = {}
    checks.check_real(q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, initial_state=initial_state)
    for name, array in (("q", q), ("k", k), ("a", a), ("b", b)):
        checks.check_shape(name, array, "b t h k", sizes)
    checks.check_shape("v", v, "b t h v", sizes)
    return _checked(
        "dplr_delta_rule",
        DPLR_DELTA_RULE,
        impl,
        sizes,
        {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay},
        {"scale": scale},
        initial_state,
        segment_ids,
        DPLR_OVER_TIME,
    )


def _checked(name, implementations, impl, sizes, inputs, options, initial_state, segment_ids, over_time):
    """The checks that both functions share, the guard for empty sequences, and the call."""
    log_decay, v = inputs["log_decay"], inputs["v"]
    checks.check_features(k=inputs["k"])
    if log_decay is not None:
        if log_decay.ndim not in (3, 4):
            raise ValueError(
                f"log_decay has shape {log_decay.shape}; expected (b, t, h) or (b, t, h, k) with "
                + ", ".join(f"{letter}={sizes[letter]}" for letter in "bthk")
            )
        checks.check_shape("log_decay", log_decay, "b t h k" if log_decay.ndim == 4 else "b t h", sizes)
        inputs["log_decay"] = checks.not_positive("log_decay", log_decay, checks.LOGARITHM)
    if initial_state is not None:
        checks.check_shape("initial_state", initial_state, "b h k v", sizes)
    segments = checks.check_segment_ids(segment_ids, sizes)
    if options["scale"] is None:
        options["scale"] = sizes["k"] ** -0.5
    if v.shape[1] == 0:
        dtype = checks.accumulation_dtype(*inputs.values(), initial_state)
        if initial_state is None:
            initial_state = jnp.zeros([sizes[letter] for letter in "bhkv"], dtype)
        return v, initial_state.astype(dtype)
    o, final = dispatch(
        name,
        implementations,
        impl,
        over_time=over_time,
        **inputs,
        **options,
        initial_state=initial_state,
        segments=segments,
    )
    return o.astype(v.dtype), final


def summarize(
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t h v"],
    beta: Float[Array, "b t h"],
    *,
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    normalize_k: bool = False,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> Piece:
    """Returns the effect of consecutive tokens: a transition (b, h, k, k) and a state (b, h, k, v).

    The first real token continues the segment before it; where it begins another segment, the caller sets `transition`
    to zero.
    """
    v, state = _with_probe(k, v)
    options = {"log_decay": log_decay, "normalize_qk": normalize_k, "segment_ids": segment_ids, "impl": impl}
    _, final = delta_rule(jnp.zeros_like(k), k, v, beta, initial_state=state, **options)
    return _piece(final)


def summarize_dplr(
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    *,
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> Piece:
    """Returns what `summarize` does, for `dplr_delta_rule`."""
    v, state = _with_probe(k, v)
    options = {"log_decay": log_decay, "segment_ids": segment_ids, "impl": impl}
    _, final = dplr_delta_rule(jnp.zeros_like(k), k, v, a, b, initial_state=state, **options)
    return _piece(final)


def _with_probe(k, v):
    """Values with k more features that stay zero, and a state that is the identity there and zero elsewhere.

    A rule treats the features of the values alike and independently, so one run gives the state and the transition.
    """
    batch, time, heads, value_dim = v.shape
    key_dim = k.shape[-1]
    padded = jnp.concatenate([v, jnp.zeros((batch, time, heads, key_dim), v.dtype)], axis=-1)
    identity = jnp.eye(key_dim, value_dim + key_dim, value_dim, checks.accumulation_dtype(k, v))
    return padded, vary_as(jnp.broadcast_to(identity, (batch, heads, *identity.shape)), k, v)


def _piece(final):
    key_dim = final.shape[-2]
    return Piece(final[..., -key_dim:], final[..., :-key_dim])


def _at_once(run, arguments, segments):
    """The piece, and the outputs by the state before: from one run with the features of `_with_probe`.

    Outputs are linear in that state, o_t = q_t^T (T_t S + U_t), and the run from the identity gives q_t^T T_t.
    """
    v = arguments["v"]
    values, state = _with_probe(arguments["k"], v)
    out, final = run(**arguments | {"v": values, "initial_state": state}, segments=segments)
    alone, read = out[..., : v.shape[-1]], out[..., v.shape[-1] :]

    def outputs(before):
        added = product("bthk,bhkv->bthv", read, before, operand_dtype(read))
        if segments is not None:  # a choice, not a product: the state of another segment may not be finite
            continues = jnp.cumsum(segments.starts, axis=1) == 0
            added = jnp.where(continues[..., None, None], added, 0)
        return (alone + added).astype(out.dtype)

    return _piece(final), outputs


_AXES = dict.fromkeys(("q", "k", "v"), ("b t h k",)) | {
    "log_decay": ("b t h", "b t h k"),
    "initial_state": ("b h k v",),
}
OVER_TIME = Recurrence(
    axes=_AXES | {"beta": ("b t h",)},
    outputs="b t h v",
    state="b h k v",
    compose=compose,
    at_once=promoting(_at_once),
)
DPLR_OVER_TIME = dataclasses.replace(OVER_TIME, axes=_AXES | dict.fromkeys(("a", "b"), ("b t h k",)))
