"""The coordinate check of muP: how far first steps move what layers give, at several widths."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.training.model import SplitModel
from experiments.training.optimizers import Optimizer, OptimizerConfig
from seqmodels import build_model
from seqmodels.recording import recording
from seqmodels.width_transfer import at_width


def coordinate_check(
    values: Mapping[str, Any],
    widths: Iterable[int],
    *,
    steps: int,
    learning_rate: float,
    batch: int = 4,
    length: int = 16,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Returns by width the root mean square of the change of the logits, the embeddings and each layer's stream by some steps of Adam.

    With muP the changes of all layers are about the same at every width (Yang et al. 2022, arXiv:2203.03466, appendix D.1);
    without it some grow. Inputs and labels are random tokens, the same at every width.

    Args:
      values: what `seqmodels.build_model` makes a language model of, with `vocab_size`, at any width.
      widths: widths to check; see `seqmodels.width_transfer.at_width`.
      batch, length: rows and tokens of the only batch.
      seed: seed of the parameters and the batch.
    """
    rng = np.random.default_rng(seed)
    inputs, labels = rng.integers(0, values["vocab_size"], (2, batch, length))
    found = {}
    for width in widths:
        wide = {**at_width(values, width), "scan": False}
        model = SplitModel(lambda rngs, wide=wide: build_model(wide, rngs=rngs))
        config = OptimizerConfig(learning_rate, schedule="constant")
        rule = Optimizer(config, model.parameters, 0, steps + 1).transformation()
        parameters, statistics = jax.jit(model.initialise)(jax.random.key(seed))

        def outputs(parameters, model=model, statistics=statistics):
            module = model.module(parameters, statistics)
            with recording() as streams:
                logits, _ = module(jnp.asarray(inputs))
            return logits, [module.embedding(jnp.asarray(inputs))[0], *streams]

        def loss(parameters, outputs=outputs):
            logits, streams = outputs(parameters)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
            return losses.mean(), (logits, *streams)

        @jax.jit
        def step(parameters, state, loss=loss, rule=rule):
            (_, given), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
            updates, state = rule.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state, given

        state, first = rule.init(parameters), None
        for _ in range(steps + 1):
            parameters, state, given = step(parameters, state)
            first = given if first is None else first
        changes = [float(jnp.sqrt(jnp.mean((b - a) ** 2))) for a, b in zip(first, given, strict=True)]
        names = ["logits", "embedding", *(f"layer {layer}" for layer in range(len(changes) - 2))]
        found[width] = dict(zip(names, changes, strict=True))
    return found
