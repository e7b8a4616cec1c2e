"""Calls of `attention` that are refused, and those with nothing to attend to."""

import jax.numpy as jnp
import pytest

from layers.kernels.attention import (
    Logits,
    Mask,
    Tokens,
    attention,
    attention_with_lse,
)
from tests.layers.kernels.test_attention import (
    KEY,
    SLOPES,
    VALUE,
    B,
    H,
    T,
    block_lists,
    draw,
    normal,
)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"causal": True, "mask": Mask(window=0)}, "window=0; expected at least 1"),
        ({"mask": Mask(window=-1)}, "window=-1; expected at least 0"),
        ({"mask": Mask(sink_tokens=2)}, "sink_tokens=2 changes nothing"),
        ({"mask": Mask(prefix_lengths=jnp.array([1, 2]))}, "prefix_lengths is for causal=True"),
        ({"mask": Mask(block_size=4)}, "block_indices and block_size go together"),
        (
            {"mask": Mask(block_indices=block_lists(1, 1, 2), block_size=4)},
            "block_indices lists 2 blocks of 4",
        ),
        ({"logits": Logits(logit_cap=0.0)}, "logit_cap=0.0; expected a positive number"),
        (
            {"tokens": Tokens(q_positions=jnp.zeros((1, T), jnp.int32))},
            "q_positions and kv_positions go together",
        ),
        (
            {"tokens": Tokens(kv_segment_ids=jnp.ones((B, T), jnp.int32))},
            "kv_segment_ids needs segment_ids",
        ),
        ({"logits": Logits(slopes=SLOPES[:2])}, "slopes has shape"),
        ({"tokens": Tokens(kv_lengths=jnp.ones(B))}, "kv_lengths has dtype float32"),
        ({"scale": jnp.ones(())}, "scale is .*; expected a number known before tracing"),
        ({"mask": jnp.ones((B, 1, T, T), bool)}, "mask is .*; expected a Mask or None"),
        ({"windw": 3}, "windw"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error):
    for function in (attention, attention_with_lse):
        with pytest.raises((ValueError, TypeError), match=error):
            function(**draw(), **options)


def test_a_window_is_known_before_tracing():
    for window in (2.0, jnp.ones((), jnp.int32)):
        with pytest.raises(TypeError, match="window is .*; expected an int known before tracing"):
            attention(**draw(), mask=Mask(window=window))


needs_positions = {
    "causal": {"causal": True},
    "window": {"mask": Mask(window=2)},
    "slopes": {"logits": Logits(slopes=SLOPES)},
}


@pytest.mark.parametrize("name", needs_positions)
def test_different_lengths_need_positions(name):
    with pytest.raises(ValueError, match="need q_positions"):
        attention(**draw(3, 5), **needs_positions[name])
    with pytest.raises(ValueError, match="give kv_segment_ids"):
        attention(**draw(3, 5), segment_ids=jnp.ones((B, 3), jnp.int32))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="q has 3 heads and k has 2"):
        attention(**(draw() | {"q": normal(0, B, T, 3, KEY)}))


def test_no_keys_and_no_queries():
    output, lse, _ = attention_with_lse(**draw(4, 0))
    assert output.shape == (B, 4, H, VALUE)
    assert (output == 0).all()
    assert (lse == -jnp.inf).all()
    assert attention(**draw(0, 4)).shape == (B, 0, H, VALUE)
