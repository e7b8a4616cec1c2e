"""The update rules as optax chains over the tree of parameters.

    u  = the direction of the rule, from gradients clipped to a global norm
    dp = -r_g s(step) (u + w_g p)           r_g, w_g: learning rate and weight decay of the parameter's group

The decay is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101) in all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from experiments.training.optimizers.config import Group, OptimizerConfig


def direction(
    config: OptimizerConfig, matrices: Mapping[str, bool], ranks: Mapping[str, int]
) -> optax.GradientTransformation:
    """Returns the transformation from gradients to the direction u of `config.name`.

    Adam: Kingma and Ba 2015 (arXiv:1412.6980). Lion: Chen et al. 2023 (arXiv:2302.06675). Adafactor: Shazeer and Stern 2018
    (arXiv:1804.04235). Muon: Jordan et al. 2024, on hidden matrices, with updates of root mean square `muon_rms` as in Liu
    et al. 2025 (arXiv:2502.16982), so that learning rate and weight decay are those of Adam, which updates all other arrays.

    Args:
      matrices: whether each parameter, by name, is a hidden matrix (in its last two axes), stacked or not.
      ranks: number of axes of each parameter by name.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    if config.name == "adamw":
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    if config.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    # The last two axes are inputs and outputs; a stacked array holds one matrix per layer.
    axes = {
        name: contrib.MuonDimensionNumbers(ranks[name] - 2, ranks[name] - 1)
        for name, matrix in matrices.items()
        if matrix
    }

    def dimensions(parameters: Any) -> Any:
        return {name: axes.get(name, optax.MaskedNode()) for name in parameters}

    muon = optax.chain(
        contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=dimensions),
        _scale_matrices(config.muon_rms),
    )
    labels = {name: "muon" if matrix else "adam" for name, matrix in matrices.items()}
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _scale_matrices(rms: float) -> optax.GradientTransformation:
    """Scales orthogonal matrices (m, n) by rms sqrt(max(m, n)), which makes their root mean square about `rms`."""

    def scale(u):
        return u if isinstance(u, optax.MaskedNode) else rms * max(u.shape[-2:]) ** 0.5 * u

    def update(updates, state, params=None):
        del params
        return jax.tree.map(scale, updates, is_leaf=lambda u: isinstance(u, optax.MaskedNode)), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


class StepCount(NamedTuple):
    """Number of updates so far."""

    count: jax.Array


def decay_and_scale(
    groups: Mapping[str, Group], factor: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """Returns the transformation u -> -r_g s (u + w_g p), with the group of each parameter by its name."""

    def update(updates, state, params):
        s = factor(state.count)
        updates = {
            name: -(groups[name].learning_rate * s) * (u + groups[name].weight_decay * params[name])
            for name, u in updates.items()
        }
        return updates, StepCount(state.count + 1)

    return optax.GradientTransformation(lambda _: StepCount(jnp.zeros((), jnp.int32)), update)
