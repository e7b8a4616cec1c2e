"""Masked means selected: what is not finite at padding or in another segment reaches nothing, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.layers.kernels.suites import SUITES, by_call
from tests.layers.kernels.test_primitives import call, cast, close, draw, parted, tolerance_of

# Segment 3 is the clean one. Chunks are shorter than the row, so that states pass between them.
ROW = [0] * 2 + [7] * 13 + [0] * 2 + [3] * 14 + [0] + [5] * 6 + [0] * 2
IDS = np.array([ROW, ROW[::-1]], np.int32)
FILLS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
calls = by_call(
    slow=lambda name, case, impl: impl == "tpu" or case not in SUITES[name].cases[:1] or impl == "reference"
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
    chosen = IDS == 3
    (want, _), want_gradients = run(suite, case, impl, arguments, chosen)
    for value in (np.nan, np.inf):
        spoiled, at = filled(suite, arguments, ~chosen, value)
        if "initial_state" in arguments:
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
