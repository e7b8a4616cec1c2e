"""Heads that score tokens by how much an answer will attend to them, trained on a model's own attention."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layers.caches.locret import features_of, retaining_scores
from layers.caches.trained import Trained
from layers.caches.watching import Watching
from layers.options import NonNegative, Positive, checked_dataclass
from layers.typing import Array, Float, Int
from seqmodels import caching
from seqmodels.language_model import LanguageModel
from seqmodels.rows import read_rows, shuffled


@checked_dataclass
class RetainingConfig:
    """Options of `train_heads`, by default those of Locret.

    Attributes:
      hidden: hidden units of a head.
      steps: number of steps, of one batch each.
      batch: rows per step.
      learning_rate: its peak, which is reached after `warmup` steps and falls to 0 linearly.
      warmup: number of those steps.
      smoothness: weight of the squared differences of the scores of neighbours.
      clip: largest entry of a gradient.
      seed: seed of the first weights and of the order of rows.
    """

    hidden: int = 1024
    steps: int = 3000
    batch: int = 1
    learning_rate: Positive = 5e-4
    warmup: int = 2000
    smoothness: NonNegative = 0.0025
    clip: Positive = 0.5
    seed: int = 1


def train_heads(
    model: LanguageModel,
    tokens: Int[Array, "n t"] | Int[np.ndarray, "n t"],
    *,
    prompt: int,
    config: RetainingConfig | None = None,
) -> tuple[Trained, Float[np.ndarray, "steps"]]:
    """Returns the retaining heads of Locret (Huang et al. 2024, arXiv:2410.01805) for a model, and the loss of each step.

        s_j = W_2 silu(W_1 [q_j, k_j, v_j]),   z_j = max_{i in answer, heads} scale q_i . k_j
        loss = mean_j smooth_l1(s_j - z_j) + smoothness sum_layers mean_j (s_{j+1} - s_j)^2

    over the tokens j of the prompt, per key/value head, whose query heads the maximum is over. The model does not change.
    `Trained.save` writes a file for `cache="locret(heads=...)"`.

    Args:
      model: a language model with attention to all tokens.
      tokens: rows of a prompt and its answer, without padding.
      prompt: number of tokens of the prompt; what follows is the answer.

    Raises:
      ValueError, TypeError: the model has no layer with a cache of all tokens, tokens are no rows of its vocabulary, or there is no
        prompt or no answer.
    """
    config = RetainingConfig() if config is None else config
    tokens = read_rows(model, tokens)
    if not 0 < prompt < tokens.shape[1]:
        raise ValueError(
            f"prompt={prompt} in tokens {list(tokens.shape)}; expected rows (n, t) with a prompt and an answer, 0 < prompt < t"
        )
    policy = Watching(length=tokens.shape[1])
    caching.check(model, policy, tokens.shape[1], 1, name=None)
    keys = jax.random.split(jax.random.key(config.seed), len(caching.layers_of(model)))
    parameters = []
    for key, mixer in zip(keys, caching.layers_of(model).values(), strict=True):
        heads = mixer.config
        sizes = (heads.heads + 2 * heads.groups) * heads.size, config.hidden, heads.groups
        first, second = jax.random.split(key)
        uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        parameters.append(dict(first=uniform(first, sizes[:2]), second=uniform(second, sizes[1:])))
    warmup = min(config.warmup, config.steps)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, warmup),
            optax.linear_schedule(config.learning_rate, 0.0, max(1, config.steps - warmup)),
        ],
        [warmup],
    )
    optimizer = optax.chain(optax.clip(config.clip), optax.adamw(rate, 0.9, 0.95, weight_decay=0.01))
    state, losses = optimizer.init(parameters), []
    for chosen in shuffled(tokens, steps=config.steps, batch=config.batch, seed=config.seed):
        given = _attention(model, jnp.asarray(chosen), policy, prompt)
        parameters, state, loss = _step(optimizer, config.smoothness, parameters, state, given)
        losses.append(float(loss))
    return Trained(parameters), np.asarray(losses)


@partial(jax.jit, static_argnums=(2, 3))
def _attention(model, tokens, policy, prompt):
    """Returns of each layer [q, k, v] of the tokens of the prompts and z."""
    state = caching.begin(model, policy, *tokens.shape)
    _, state = model.unprojected(tokens, state)
    found = []
    for layer, mixer in caching.layers_of(model).items():
        one, view = state.layers[layer].carried, mixer.view()
        positions = one.cache.positions[:, :prompt]
        pieces = one.queries[:, :prompt], one.keys[:, :prompt], one.values[:, :prompt]
        features = features_of(view, *pieces, positions)
        asked, groups = one.queries[:, prompt:], one.keys.shape[2]
        bias = jnp.zeros((len(tokens), asked.shape[2], asked.shape[1], prompt))
        products = view.products(asked, one.keys[:, :prompt], bias).max(2)
        target = products.reshape(len(tokens), groups, -1, prompt).max(2)
        found.append((features, jnp.moveaxis(target, 1, 2)))
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _step(optimizer, smoothness, parameters, state, given):
    """Returns the parameters and the state of the optimizer after a step, and the loss before it."""

    def loss_of(parameters: list[Mapping[str, Any]]):
        losses, changes = [], []
        for arrays, (features, target) in zip(parameters, given, strict=True):
            scores = retaining_scores(arrays, features)
            losses.append(optax.huber_loss(scores, target).mean((0, 1)))
            changes.append(jnp.square(scores[:, 1:] - scores[:, :-1]).mean() if scores.shape[1] > 1 else 0.0)
        return jnp.concatenate(losses).mean() + smoothness * sum(changes)

    loss, gradients = jax.value_and_grad(loss_of)(parameters)
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state, loss
