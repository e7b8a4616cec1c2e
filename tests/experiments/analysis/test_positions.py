"""Losses by position, against one pass over whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.analysis.positions import by_range, losses_by_position, table
from seqmodels import build_model

CONFIG = dict(
    kind="language_model",
    vocab_size=11,
    width=8,
    depth=2,
    pattern=("mamba2", "attention"),
    mixers={"attention": dict(heads=2), "mamba2": dict(head_dim=8, state_size=8)},
    scan=False,
)


@pytest.mark.slow
def test_losses_are_those_of_one_pass():
    model = build_model(CONFIG, rngs=nnx.Rngs(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 14), 0, 11))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    want = np.array(
        optax.softmax_cross_entropy_with_integer_labels(model(jnp.asarray(inputs))[0], jnp.asarray(labels))
    )
    labels[1, 3] = -1
    want[1, 3] = np.nan
    np.testing.assert_allclose(losses_by_position(model, inputs, labels, chunk=5), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"inputs \(2, 13\) and labels \(2, 14\) must both be"):
        losses_by_position(model, inputs, tokens)
    with pytest.raises(ValueError, match="chunk=0; expected at least 1"):
        losses_by_position(model, inputs, labels, chunk=0)


def test_ranges_double_and_end_at_the_trained_length():
    losses = np.log(2) * np.arange(1, 13, dtype=np.float64)[None].repeat(2, 0)
    losses[1, 4] = np.nan
    rows = by_range(losses, trained=5)
    assert [(row["first"], row["last"]) for row in rows] == [(1, 1), (2, 3), (4, 5), (6, 7), (8, 12)]
    assert [row["beyond"] for row in rows] == [False, False, False, True, True]
    assert rows[1]["bits"] == pytest.approx(2.5)
    assert rows[2]["bits"] == pytest.approx((4 + 4 + 5) / 3)
    assert rows[2]["count"] == 3
    assert rows[1]["perplexity"] == pytest.approx(2**2.5)
    assert "8-12 *" in table(rows)
    assert by_range(losses, trained=100)[-1] == by_range(losses, trained=12)[-1]
