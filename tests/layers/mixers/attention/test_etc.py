"""ETC against its equation in NumPy, and against full attention where nothing is labelled or hidden."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.mixers.literal import apply, by_row, drawn, heads, softmax, tokens, wide

WIDTH, HEADS = 6, 2


def literal(model, x):
    config, t = model.config, len(x)
    n = min(config.global_tokens, t)
    share = max(-(-(t - n) // n), 1)
    q, k, v = (heads(apply(m, x), HEADS) for m in (model.query, model.key, model.value))
    y = np.zeros_like(q)

    def label(i, j):
        """The kind of a pair and its label there."""
        if (i < n) == (j < n):
            return ("long_long" if i >= n else "global_global"), np.clip(
                j - i, -config.clip, config.clip
            ) + config.clip
        kind, long, of = ("global_long", j, i) if i < n else ("long_global", i, j)
        return kind, int((long - n) // share == of)

    for h in range(HEADS):
        for i in range(t):
            seen = [j for j in range(t) if i < n or j < n or abs(i - j) <= config.radius]
            logits = []
            for j in seen:
                kind, number = label(i, j)
                a, c = wide(getattr(model, f"{kind}_keys")), wide(getattr(model, f"{kind}_biases"))
                logits.append((q[i, h] @ (k[j, h] + a[number, h]) + c[number, h]) / np.sqrt(q.shape[2]))
            y[i, h] = softmax(np.array(logits)) @ v[seen, h]
    y = y.reshape(t, -1)
    return np.concatenate([apply(model.global_output, y[:n]), apply(model.output, y[n:])])


@pytest.mark.sample(3)
@pytest.mark.parametrize("time", [21, 4, 2])
def test_equals_its_equation(time):
    """Also where nothing but global tokens is left, or not even all of them."""
    model = drawn("etc", WIDTH, heads=HEADS, global_tokens=3, radius=4, clip=2, bias=True)
    x = tokens(time, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(lambda x: literal(model, x), x), atol=1e-5)


@pytest.mark.slow
def test_a_global_token_owns_its_share_of_its_own_sequence():
    model = drawn("etc", WIDTH, heads=HEADS, global_tokens=3, radius=4, clip=2)
    x = tokens(21, WIDTH)
    got = np.asarray(model(x, segment_ids=jnp.asarray([[1] * 12 + [2] * 9, [1] * 16 + [0] * 5]))[0])
    rows = np.asarray(x, np.float64)
    for row, part in ((0, slice(0, 12)), (0, slice(12, 21)), (1, slice(0, 16))):
        np.testing.assert_allclose(got[row, part], literal(model, rows[row, part]), atol=1e-5)
