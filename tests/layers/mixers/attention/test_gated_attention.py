"""Gated attention against attention and its gate in NumPy, at all five positions."""

import jax
import numpy as np
import pytest
from flax import nnx

from layers.mixers.attention.attention import Attention
from layers.mixers.attention.gated_attention import GATE_AT, GatedAttention, GatedAttentionConfig
from layers.parts.attention_config import AttentionConfig

WIDTH, TIME = 8, 9
X = jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))


def make(**options):
    options = {"heads": 4, "kv_heads": 2, "head_dim": 4, "position": "none", "qk_norm": False} | options
    return GatedAttention(GatedAttentionConfig(width=WIDTH, **options), rngs=nnx.Rngs(0))


def literal(model):
    """The layer in float64, with loops over heads."""
    config = model.config
    maps = {
        n: np.asarray(getattr(model, n).kernel[...], np.float64)
        for n in ("query", "key", "value", "output", "gate")
    }
    x = np.asarray(X, np.float64)
    parts = {n: (x @ maps[n]).reshape(2, TIME, -1, 4) for n in ("query", "key", "value")}
    gate = 1 / (1 + np.exp(-x @ maps["gate"]))

    def gated(y):
        each = 1 if config.gate_size == "headwise" else 4
        return y * gate.reshape(2, TIME, y.shape[2], each)

    if config.gate in parts:
        parts[config.gate] = gated(parts[config.gate])
    o = np.zeros((2, TIME, 4, 4))
    for head in range(4):
        q, k, v = parts["query"][:, :, head], parts["key"][:, :, head // 2], parts["value"][:, :, head // 2]
        weights = np.exp(q @ k.swapaxes(1, 2) / 2) * np.tril(np.ones((TIME, TIME)))
        o[:, :, head] = weights / weights.sum(2, keepdims=True) @ v
    o = gated(o) if config.gate == "attention" else o
    y = o.reshape(2, TIME, 16) @ maps["output"]
    return y * gate if config.gate == "output" else y


@pytest.mark.sample(3)
@pytest.mark.parametrize("gate", GATE_AT)
@pytest.mark.parametrize("gate_size", ["elementwise", "headwise"])
def test_equals_the_equation(gate, gate_size):
    if (gate, gate_size) == ("output", "headwise"):
        with pytest.raises(ValueError, match="use gate_size='elementwise'"):
            make(gate=gate, gate_size=gate_size)
        return
    model = make(gate=gate, gate_size=gate_size)
    np.testing.assert_allclose(model(X)[0], literal(model), atol=2e-6)


@pytest.mark.slow
def test_open_gates_leave_attention():
    model = make(bias=True, position="rope", qk_norm=True)
    model.gate.bias[...] = 40.0
    plain = Attention(
        AttentionConfig(width=WIDTH, heads=4, kv_heads=2, head_dim=4, bias=True, qk_norm=True),
        rngs=nnx.Rngs(0),
    )
    np.testing.assert_allclose(model(X)[0], plain(X)[0], atol=1e-6)


def test_the_gate_of_a_token_acts_on_its_output_alone():
    """Gates of values act on later outputs as well, though both gate what the values carry."""
    reach = {}
    for gate in ("attention", "value"):
        model = make(gate=gate)
        logits, parts = model.gate(X), nnx.split(model)

        def run(logits, parts=parts):
            model = nnx.merge(*parts)
            model.gate = lambda x: logits
            return model(X)[0].sum(-1)

        derivative = jax.jacobian(run)(logits)[0, :, 0]
        reach[gate] = np.abs(derivative).max(-1)
    assert (reach["attention"] > 0).tolist() == np.eye(TIME, dtype=bool).tolist()
    assert (reach["value"] > 0).tolist() == np.tril(np.ones((TIME, TIME), bool)).tolist()


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="gate='values'; expected 'attention', .*did you mean 'value'"):
        make(gate="values")
    with pytest.raises(ValueError, match="gate_size='scalar'"):
        make(gate_size="scalar")
