"""Masked means selected: what is not finite at padding, in another segment or later reaches nothing, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.attention import Logits, Mask, Tokens, attention, schedule
from layers.kernels.segments import Segments
from tests.layers.kernels.suites import SUITES, by_call
from tests.layers.kernels.test_primitives import call, cast, close, draw, parted, tolerance_of

# Segment 3 is the clean one. Chunks are shorter than the row, so that states pass between them.
ROW = [0] * 2 + [7] * 13 + [0] * 2 + [3] * 14 + [0] + [5] * 6 + [0] * 2
IDS = np.array([ROW, ROW[::-1]], np.int32)
calls = by_call(
    slow=lambda name, case, impl: impl != "xla" or case is not SUITES[name].cases[0] or name.startswith("d")
)


def filled(suite, arguments, where, value):
    """The arguments with a value at some tokens of everything that has a time axis, and the same flags by argument."""

    def one(name, x):
        x = np.array(x)
        at = np.zeros(x.shape, bool)
        if name in suite.time_arguments and x.ndim > 1 and x.shape[:2] == where.shape:
            at[where] = True
            # A log-decay of -inf is a decay of zero.
            x[where] = np.nan if name == "log_decay" else value
        return x, at

    both = {k: one(k, v) if k in suite.time_arguments else (v, None) for k, v in arguments.items()}
    return {k: v[0] for k, v in both.items()}, {k: v[1] for k, v in both.items()}


def run(suite, case, impl, arguments, chosen, ids=IDS):
    """Outputs and gradients of a loss over the chosen tokens; those of the others are selected away."""
    moving, fixed = parted(arguments)

    @jax.jit
    def both(moving):
        def loss(moving):
            out = call(suite, case, impl, moving | fixed, segment_ids=jnp.asarray(ids))
            out, final = out if case.state is not None else (out, None)
            shown = jnp.where(jnp.expand_dims(chosen, tuple(range(2, out.ndim))), out, 0)
            return jnp.sum(jnp.abs(shown) ** 2), (shown, final)

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(moving)
        return out, gradients

    return both(jax.tree.map(jnp.asarray, moving))


@calls
def test_other_tokens_reach_nothing(name, case, impl):
    if not case.segments or case.name == "prefix":
        return
    suite = SUITES[name]
    arguments = cast(draw(case, *IDS.shape), "float32")
    # Kernels for TPUs keep only padding out.
    chosen = IDS != 0 if impl == "tpu" else IDS == 3
    (want, _), want_gradients = run(suite, case, impl, arguments, chosen)
    for value in (np.nan, np.inf):
        spoiled, at = filled(suite, arguments, ~chosen, value)
        if "initial_state" in arguments and impl != "tpu":
            # The state belongs to the first real token, which is not of segment 3.
            spoiled["initial_state"] = np.full(arguments["initial_state"].shape, value, np.float32)
        (got, _), gradients = run(suite, case, impl, spoiled, chosen)
        close(got, np.asarray(want), tolerance_of(case, "float32"), f"outputs beside {value}")
        for key, gradient in gradients.items():
            close(
                gradient,
                jax.tree.map(np.asarray, want_gradients[key]),
                1e-5,
                f"gradient of {key} beside {value}",
            )
            if at.get(key) is not None:
                assert not np.asarray(gradient)[at[key]].any(), f"gradient of {key} where it is {value}"


EARLY, TIME = 20, 25
CAUSAL = [
    pytest.param(call, id=f"{call[0]}-{call[1].name}-{call[2]}", marks=pytest.mark.slow)
    for name, suite in SUITES.items()
    for case in suite.cases
    for call in [(name, case, impl) for impl in ("reference", *suite.implementations)]
    if name != "ssm_kernel" and not (case.options.get("circular") or case.options.get("reverse"))
    if name != "attention" or case.options.get("causal")
]
# One program for one call of each primitive in which tokens meet in products or sums.
EACH = [
    (name, SUITES[name].cases[index], "xla")
    for name, index in {
        "gated_linear_attention": 0,
        "delta_rule": 0,
        "linear_recurrence": 0,
        "long_conv": 1,
        "selective_scan": 1,
        "short_conv": 1,
    }.items()
]


def early(calls, arguments, factor):
    """Outputs of the first tokens without segment ids, and gradients of a loss over them, which multiplies by a factor first."""

    @jax.jit
    def both(moving, factor):
        def loss(moving):
            outputs = []
            for (name, case, impl), some, (_, fixed) in zip(calls, moving, parts, strict=True):
                out = call(SUITES[name], case, impl, some | fixed)
                out = out[0] if isinstance(out, tuple) else out
                kept = jnp.expand_dims(jnp.arange(TIME) < EARLY, (0, *range(2, out.ndim)))
                outputs.append(jnp.where(kept, out * jnp.expand_dims(factor, (0, *range(2, out.ndim))), 0))
            return sum(jnp.sum(jnp.abs(out) ** 2) for out in outputs), outputs

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(moving)
        return outputs, gradients

    parts = [parted(some) for some in arguments]
    return jax.tree.map(np.asarray, both([moving for moving, _ in parts], jnp.asarray(factor, jnp.float32)))


@pytest.mark.parametrize("calls", [pytest.param(EACH, id="each"), *CAUSAL])
def test_later_tokens_reach_nothing_without_ids(calls):
    """Outputs of earlier tokens and gradients of a loss over them, in whose derivative later ones are 0 x NaN too."""
    calls = calls if isinstance(calls, list) else [calls]
    arguments = [cast(draw(case, 2, TIME), "float32") for _, case, _ in calls]
    want, want_gradients = early(calls, arguments, np.ones(TIME))
    late = np.broadcast_to(np.arange(TIME) >= EARLY, (2, TIME))
    for value in (np.nan, np.inf):
        spoiled = [
            filled(SUITES[name], one, late, value)[0]
            for (name, _, _), one in zip(calls, arguments, strict=True)
        ]
        got, gradients = early(calls, spoiled, np.where(late[0], np.nan, 1))
        for (name, case, _), *each in zip(calls, got, want, gradients, want_gradients, strict=True):
            got_one, want_one, gradient, want_gradient = each
            close(got_one, want_one, tolerance_of(case, "float32"), f"outputs of {name} before {value}")
            for key in gradient:
                message = f"gradient of {key} of {name} before {value}"
                close(gradient[key], want_gradient[key], 2e-5, message)


OVERFLOWS = {
    "gated_linear_attention": ("v",),
    "linear_recurrence": ("x",),
    "selective_scan": ("x",),
    "short_conv": ("x",),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "linear_recurrence")) for n in OVERFLOWS]
)
def test_what_overflows_in_one_segment_reaches_no_other(name):
    """Numbers whose products and sums are infinite, in the segments before and after the one of the loss."""
    suite = SUITES[name]
    case = suite.cases[0]
    arguments = cast(draw(case, *IDS.shape), "float32")
    chosen = IDS == 3
    (want, _), want_gradients = run(suite, case, "xla", arguments, chosen)
    large, _ = filled(suite, arguments, ~chosen, 3e38)
    spoiled = arguments | {key: large[key] for key in OVERFLOWS[name]}
    (got, _), gradients = run(suite, case, "xla", spoiled, chosen)
    close(got, np.asarray(want), tolerance_of(case, "float32"), "outputs")
    for key in gradients:
        shared = key not in suite.time_arguments
        pick = slice(None) if shared or key == "initial_state" else chosen
        close(gradients[key][pick], np.asarray(want_gradients[key])[pick], 1e-5, f"gradient of {key}")


@pytest.mark.slow
def test_nan_reaches_later_tokens_of_its_segment_only():
    for name in ("gated_linear_attention", "linear_recurrence"):
        suite = SUITES[name]
        case = suite.cases[0]
        arguments = cast(draw(case, *IDS.shape), "float32")
        at = np.zeros(IDS.shape, bool)
        at[0, 20] = True
        spoiled, _ = filled(suite, arguments, at, np.nan)
        for impl in ("reference", "xla"):
            (got, final), _ = run(suite, case, impl, spoiled, IDS > 0)
            reached = np.isnan(np.asarray(got)).reshape(*IDS.shape, -1).all(2)
            np.testing.assert_array_equal(reached[0], (IDS[0] == 3) & (np.arange(IDS.shape[1]) >= 20))
            assert not reached[1].any()
            assert np.isfinite(final).all()


KEYS = 40
HIDDEN = {
    "future": ({"causal": True}, slice(30, None), slice(0, 30)),
    "out of the window": ({"causal": True, "mask": Mask(window=4)}, slice(5, 9), slice(12, None)),
    "out of a window on both sides": ({"mask": Mask(window=3)}, slice(5, 9), slice(12, None)),
    "beyond kv_lengths": (
        {"tokens": Tokens(kv_lengths=jnp.array([30, 30]))},
        slice(30, None),
        slice(0, KEYS),
    ),
    "below a bias of -inf": ({"bias": True}, slice(30, None), slice(0, 30)),
    "padding": ({"segment_ids": jnp.array([[1] * 30 + [0] * 10] * 2)}, slice(30, None), slice(0, 30)),
    "padding at the end of whole rows": (
        {"segment_ids": Segments.of(jnp.array([[1] * 30 + [0] * 10] * 2), padding="end", packed=False)},
        slice(30, None),
        slice(0, 30),
    ),
}


@pytest.mark.parametrize(
    "name, impl",
    [
        pytest.param(
            name, impl, marks=[pytest.mark.slow] * (impl != "xla" or name not in ("future", "padding"))
        )
        for name in HIDDEN
        for impl in ("reference", "xla")
    ],
)
def test_hidden_keys_reach_no_row_of_attention(name, impl, monkeypatch):
    """Outputs and gradients of rows that do not see the keys, in blocks of which they see others."""
    monkeypatch.setattr(schedule, "CPU_STEP_BYTES", 4 * 4 * 8 * 8)
    monkeypatch.setattr(schedule, "PAIR_BLOCKS", (8, 8))
    options, hidden, rows = HIDDEN[name]
    options = dict(options)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, KEYS, 2, 4)).astype(np.float32) for _ in range(3))
    if options.pop("bias", None):
        options["logits"] = Logits(bias=jnp.zeros((1, 1, KEYS, KEYS)).at[..., 30:].set(-jnp.inf))
    queries_hidden = name in ("future", "padding", "padding at the end of whole rows")

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out = attention(q, k, v, impl=impl, **options)[:, rows]
            return jnp.square(out).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    want = run(q, k, v)
    for value in (np.nan, np.inf):
        for x in (q, k, v)[0 if queries_hidden else 1 :]:
            x[:, hidden] = value
        got = run(q, k, v)
        close(got, jax.tree.map(np.asarray, want), 1e-5, f"{name}, {value}")
        for gradient in got[1][0 if queries_hidden else 1 :]:
            assert not np.asarray(gradient)[:, hidden].any()


def test_hidden_keys_of_one_query():
    """Decoding: the unused end of a cache holds anything."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 1, 2, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 16, 1, 4)), jnp.float32) for _ in range(2))
    tokens = Tokens(kv_lengths=jnp.array([9, 12]))
    run = jax.jit(lambda k, v: attention(q, k, v, tokens=tokens, impl="xla"))
    want = run(k, v)
    unused = (jnp.arange(16)[None] >= tokens.kv_lengths[:, None])[..., None, None]
    k, v = (jnp.where(unused, jnp.nan, x) for x in (k, v))
    np.testing.assert_allclose(run(k, v), want, rtol=1e-5)
    np.testing.assert_allclose(attention(q, k, v, tokens=tokens, impl="reference"), want, rtol=1e-5)
    seen = run(k, v.at[0, 3].set(jnp.nan))
    assert np.isnan(seen[0]).all()
    assert np.isfinite(seen[1]).all()
