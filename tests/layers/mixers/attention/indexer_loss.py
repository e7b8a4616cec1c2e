"""The loss of a lightning indexer in training, whatever attention it chooses for."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.adapters import dropping


def check(model, x, literal):
    """Raises unless a loss with the factor 0.5 is that of real tokens in NumPy, and trains the indexer alone.

    Args:
      model: a mixer with the option `index_loss` of 0.5.
      x: (2, t, d).
      literal: a function of the model and a row (t, d), which returns outputs and the divergence (t,) of every query.
    """
    ids = jnp.ones(x.shape[:2], jnp.int32).at[0, 7:].set(0)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(parameters, x):
        def of(parameters, x):
            model = nnx.merge(graph, parameters, rest, copy=True)
            with dropping(jax.random.key(0)):
                model(x, segment_ids=ids)
            return model.indexer.auxiliary[...]

        return jax.value_and_grad(of, (0, 1))(parameters, x)

    value, (gradients, of_x) = loss(parameters, x)
    assert (of_x == 0).all()
    rows = np.asarray(x, np.float64)
    each = np.concatenate([literal(model, rows[0, :7])[1], literal(model, rows[1])[1]])
    np.testing.assert_allclose(value, 0.5 * each.mean(), rtol=1e-5)
    moved = {name[:2] for name, g in nnx.to_flat_state(gradients) if jnp.any(g[...] != 0)}
    assert moved == {("indexer", name) for name in ("query", "key", "norm", "weight")}
