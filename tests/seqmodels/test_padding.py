"""Whatever stands in the padding of a batch reaches no output, statistic, loss or gradient of a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.parameters import AuxiliaryLoss
from seqmodels import build_model

WIDTH, BATCH, TIME, SIZE = 8, 3, 9, 5
# Padding at the end, in front and inside; the last row has a single token.
IDS = np.asarray([[1] * 6 + [0] * 3, [0, 0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0]], np.int32)
BODY = {"width": WIDTH, "depth": 2, "mixer_defaults": {"heads": 2}, "dropout": 0.1}
CLASSIFIER = BODY | {"kind": "classifier", "num_classes": 4, "input_size": SIZE}
TOKENS = BODY | {"vocab_size": SIZE}
MODELS = {
    "mean, batch norm, experts": CLASSIFIER
    | {"pattern": ("gla+moe",), "norm": "batch_norm", "channels": {"moe": {"experts": 3}}},
    "last, joint": CLASSIFIER
    | {"pattern": ("fnet",), "channel": "half_glu2", "residual": "joint", "pooling": "last"},
    "first, post-norm": CLASSIFIER
    | {"pattern": ("bidirectional",), "mixers": {"bidirectional": {"inner": "gla"}}, "pooling": "first"}
    | {"norm": "layer_norm", "norm_position": "post", "channel": "geglu", "absolute_positions": "sinusoidal"},
    "language model": TOKENS
    | {"kind": "language_model", "pattern": ("attention",), "channel": "mlp"}
    | {"absolute_positions": "learned", "max_positions": TIME},
    "autoencoder": TOKENS | {"kind": "autoencoder", "pattern": ("gla",)},
    "regressor": BODY
    | {"kind": "regressor", "output_size": 2, "input_size": SIZE, "pattern": ("gla", "attention")},
}

# The others compile for longer.
DEFAULT = ("mean, batch norm, experts",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DEFAULT)) for name in MODELS]
)
def test_padding_is_neither_seen_nor_learned_from(name):
    graph, parameters, rest = nnx.split(build_model(MODELS[name], rngs=nnx.Rngs(0)), nnx.Param, ...)
    vectors = MODELS[name].get("input_size") is not None
    rng, real = np.random.default_rng(0), IDS != 0
    x = rng.standard_normal((BATCH, TIME, SIZE)) if vectors else rng.integers(0, SIZE, (BATCH, TIME))
    x = x.astype(np.float32 if vectors else np.int32)

    @jax.jit
    def run(parameters, x):
        def loss(parameters, x):
            with jax.numpy_dtype_promotion("strict"):
                model = nnx.merge(graph, parameters, rest, copy=True)
                y, _ = model(x, segment_ids=jnp.asarray(IDS), key=jax.random.key(1))
            new = nnx.state(model, (nnx.BatchStat, AuxiliaryLoss))
            seen = y if y.ndim == 2 else jnp.where(real[..., None], y, 0)
            return jnp.square(seen).sum() + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(new)), (seen, new)

        wanted = (0, 1) if vectors else (0,)
        return jax.value_and_grad(loss, argnums=wanted, has_aux=True)(parameters, x)

    clean = run(parameters, x)
    for leaf in jax.tree.leaves(clean):
        assert np.isfinite(leaf).all()
    for fill in (np.nan, np.inf) if vectors else (300, -100):
        filled = np.where(real[..., None] if vectors else real, x, fill).astype(x.dtype)
        jax.tree.map(np.testing.assert_array_equal, run(parameters, filled), clean)
    if vectors:
        assert (np.asarray(clean[1][1])[~real] == 0).all()
