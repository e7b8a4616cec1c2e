"""States that do not belong to a model are refused; those of single mixers are in tests/layers/mixers/test_states.py."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from seqmodels import build_model

MODEL = {"kind": "language_model", "width": 8, "vocab_size": 5, "channel": "none", "depth": 2}
S5, LSTM = (MODEL | {"pattern": (name,), "mixer_defaults": {"state_size": 4}} for name in ("s5", "lstm"))
POSITIONS = S5 | {"absolute_positions": "sinusoidal"}
TOKENS = jnp.zeros((2, 3), jnp.int32)


def made(config):
    return build_model(config, rngs=nnx.Rngs(0))


def test_states_of_other_models_are_refused():
    # Traced as a whole, so that nothing is compiled.
    jax.eval_shape(_refuse_states)


def _refuse_states():
    model, other, deep = made(S5), made(LSTM), made(S5 | {"depth": 3})
    state = model.init_state(2)
    wrong = {
        r"state of a language model is a tuple": state.layers,
        r"state of S5 is that of another mixer": other.init_state(2),
        r"state of a stack has 3 layers; expected 2": deep.init_state(2),
        r"state of a stack has 1 layers; expected 2": state._replace(layers=state.layers[:1]),
        r"state of a stack is a MixerState": state._replace(layers=state.layers[0]),
        r"for x of 2 rows": model.init_state(3),
        r"place of its rows, but absolute_positions='none'": made(POSITIONS).init_state(2),
    }
    for message, given in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            model(TOKENS, given)
    with pytest.raises(ValueError, match="no place of its rows, but absolute_positions='sinusoidal'"):
        made(POSITIONS)(TOKENS, state)
    # Whether layers run under a scan or one by one, their states are the same.
    made(S5 | {"scan": False})(TOKENS, state)


def test_layers_out_of_range_are_refused():
    stack = made(S5).stack
    for layer in (-1, 2):
        with pytest.raises(IndexError, match=rf"layer={layer}; expected 0 to 1, as depth=2"):
            stack.block(layer)
