"""LongT5 against its equation in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.mixers.literal import apply, by_row, drawn, heads, softmax, tokens, wide

WIDTH, HEADS, RADIUS, BLOCK = 6, 2, 3, 4


def bucket(relative, buckets=8, most=12):
    """T5's bucket of a relative position, both ways."""
    half, distance = buckets // 2, abs(relative)
    exact = half // 2
    far = exact + int(np.log(max(distance, 1) / exact) / np.log(most / exact) * (half - exact) + 1e-9)
    return (distance if distance < exact else min(far, half - 1)) + (half if relative > 0 else 0)


def literal(model, x, summaries):
    q, k, v = (heads(apply(m, x), HEADS) for m in (model.query, model.key, model.value))
    count = len(x) // BLOCK if summaries else 0
    own = [min(i // BLOCK, count - 1) for i in range(len(x))]
    sums = np.stack([x[np.array(own) == B].sum(0) for B in range(count)]) if count else np.zeros((0, WIDTH))
    g = sums / np.sqrt((sums**2).mean(-1, keepdims=True) + 1e-6)
    if count:
        g = g * wide(model.summary_scale)
    gk, gv = (heads(apply(m, g), HEADS) for m in (model.key, model.value))
    near, far = wide(model.near_bias), wide(model.far_bias) if summaries else None
    y = np.zeros_like(q)
    for h in range(HEADS):
        for i in range(len(x)):
            seen = [j for j in range(len(x)) if abs(i - j) <= RADIUS]
            logits = [q[i, h] @ k[j, h] + near[bucket(j - i), h] for j in seen]
            logits += [q[i, h] @ gk[B, h] + far[bucket(B - own[i]), h] for B in range(count)]
            y[i, h] = softmax(np.array(logits)) @ np.concatenate([v[seen, h], gv[:, h]])
    return apply(model.output, y.reshape(len(x), -1))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "time, attention", [(23, "transient_global"), (23, "local"), (3, "transient_global")]
)
def test_equals_its_equation(time, attention):
    """With tokens behind the last block, without summaries, and with less than a block."""
    options = {"radius": RADIUS, "block": BLOCK, "buckets": 8, "max_distance": 12, "attention": attention}
    model = drawn("longt5", WIDTH, heads=HEADS, bias=True, **options)
    x = tokens(time, WIDTH)
    want = by_row(lambda x: literal(model, x, attention != "local"), x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5)


@pytest.mark.slow
def test_what_stands_behind_a_sequence_is_no_part_of_its_summaries():
    """Lengths that leave a part of a block, in one call with another sequence."""
    model = drawn("longt5", WIDTH, heads=HEADS, radius=RADIUS, block=BLOCK, buckets=8, max_distance=12)
    x = tokens(23, WIDTH)
    ids = jnp.asarray([[1] * 14 + [2] * 9, [1] * 3 + [0] * 20])
    got = np.asarray(model(x, segment_ids=ids)[0])
    rows = np.asarray(x, np.float64)
    for row, part in ((0, slice(0, 14)), (0, slice(14, 23)), (1, slice(0, 3))):
        np.testing.assert_allclose(got[row, part], literal(model, rows[row, part], True), atol=1e-5)
