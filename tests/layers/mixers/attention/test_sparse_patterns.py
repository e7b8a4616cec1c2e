"""Longformer and BigBird against their equations in NumPy, pair by pair, and what their patterns must hold."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.mixers.attention.bigbird import BigBirdConfig, block_plan
from tests.layers.mixers.literal import apply, by_row, drawn, heads, masked_softmax, tokens

WIDTH, TIME, HEADS = 6, 23, 2


def attended(q, k, v, seen):
    """Outputs (t, h, k) of softmax attention over the keys that are seen (h, t, s)."""
    return np.stack(
        [
            masked_softmax(q[:, h] @ k[:, h].T / np.sqrt(q.shape[2]), seen[h]) @ v[:, h]
            for h in range(q.shape[1])
        ],
        axis=1,
    )


def projected(model, x, *names):
    return (heads(apply(getattr(model, name), x), model.config.heads) for name in names)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dilated, count", [(1, 2), (None, 0)])
def test_longformer_equals_its_equation(dilated, count):
    model = drawn(
        "longformer",
        WIDTH,
        heads=HEADS,
        window=3,
        dilation=3,
        dilated_heads=dilated,
        global_tokens=count,
        bias=True,
    )

    def literal(x):
        distance = np.abs(np.subtract.outer(np.arange(len(x)), np.arange(len(x))))
        rates = np.array([1 if dilated else 3, 3])[:, None, None]
        seen = (distance <= 3 * rates) & (distance % rates == 0) | (np.arange(len(x)) < count)
        y = attended(*projected(model, x, "query", "key", "value"), seen)
        everything = np.ones_like(seen)
        q, k, v = projected(model, x, "global_query", "global_key", "global_value")
        y[:count] = attended(q, k, v, everything)[:count]
        return apply(model.output, y.reshape(len(x), -1))

    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(literal, x), atol=1e-5)


def plan_of(model, length, time):
    config, size = model.config, model.config.block
    blocks, count = -(-time // size), jnp.asarray([-(-length // size)])
    return np.asarray(block_plan(config, model.seed[...], blocks, count))[0]


def bigbird(**options):
    model = drawn("bigbird", WIDTH, heads=HEADS, block=2, random_blocks=2, **options)
    model.seed[...] = jnp.asarray(3.0)
    return model


def test_bigbird_equals_its_equation():
    """Pairs of blocks from the paper's sets, and those of the plan for the random ones; each key counts once."""
    model = bigbird()

    def literal(x):
        size, n = model.config.block, -(-len(x) // model.config.block)
        plan, seen = plan_of(model, len(x), len(x)), np.zeros((HEADS, len(x), len(x)), bool)
        for h in range(HEADS):
            for i in range(len(x)):
                row = i // size
                blocks = {0, n - 1, row - 1, row, row + 1, *plan[h, row, 3:]} - {-1, n}
                if row in (0, n - 1):
                    blocks = set(range(n))
                for block in blocks:
                    seen[h, i, block * size : (block + 1) * size] = True
        return apply(
            model.output, attended(*projected(model, x, "query", "key", "value"), seen).reshape(len(x), -1)
        )

    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(literal, x), atol=1e-5)


def test_random_blocks_are_a_draw_without_replacement_that_stays():
    model = bigbird()
    plan = plan_of(model, 40, 40)
    for h in range(HEADS):
        for row in range(20):
            random = set(plan[h, row, 3:])
            assert len(random) == 2
            assert not random & {0, 19, row - 1, row, row + 1, -1}
    assert (plan_of(model, 40, 64)[:, :20] == plan).all(), "what stands behind a sequence changes its draw"
    assert (plan[0] != plan[1]).any(), "heads share a draw"
    other = BigBirdConfig(WIDTH, heads=HEADS, block=2, random_blocks=2)
    drawn_anew = np.asarray(block_plan(other, jnp.asarray(4.0), 20, jnp.asarray([20])))[0]
    assert (drawn_anew != plan).any(), "layers share a draw"
    # Every block that may be drawn is: 16 of 20 for a row in the middle, over many seeds.
    many = [
        np.asarray(block_plan(other, jnp.asarray(float(s)), 20, jnp.asarray([20])))[0, 0, 9, 3:]
        for s in range(60)
    ]
    assert set(np.concatenate(many)) == set(range(1, 19)) - {8, 9, 10}


@pytest.mark.slow
def test_short_sequences_of_bigbird_see_everything():
    model = bigbird()
    x = tokens(7, WIDTH)
    everything = np.ones((HEADS, 7, 7), bool)

    def literal(x):
        return apply(
            model.output, attended(*projected(model, x, "query", "key", "value"), everything).reshape(7, -1)
        )

    np.testing.assert_allclose(model(x)[0], by_row(literal, x), atol=1e-5)
