"""Gates that decide which tokens a head keeps, trained on a model's own loss."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layers.caches.attention_gate import gate_logits, projected
from layers.caches.locret import features_of
from layers.caches.selecting import to_heads
from layers.caches.state import CacheState, View
from layers.caches.trained import Trained
from layers.caches.watching import Watching
from layers.options import NonNegative, Positive, UnitInterval, checked_dataclass
from layers.parts.cache import Cache, Seen
from layers.segments import Visit
from layers.typing import Array, Float, Int
from seqmodels import caching
from seqmodels.language_model import LanguageModel
from seqmodels.rows import read_rows, shuffled


@checked_dataclass
class GatingConfig:
    """Options of `train_gates`.

    Attributes:
      heads, width: heads of a gate and the features of each.
      keep: share of the tokens that gates should keep.
      weight: weight of the distance from it.
      steps: number of steps, of one batch each.
      batch: rows per step.
      learning_rate: of AdamW.
      seed: seed of the first weights and of the order of rows.
    """

    heads: int = 4
    width: int = 16
    keep: UnitInterval = 0.5
    weight: NonNegative = 5.0
    steps: int = 1000
    batch: int = 1
    learning_rate: Positive = 1e-3
    seed: int = 1


def train_gates(
    model: LanguageModel,
    tokens: Int[Array, "n t"] | Int[np.ndarray, "n t"],
    *,
    config: GatingConfig | None = None,
) -> tuple[Trained, Float[np.ndarray, "steps 2"]]:
    """Returns gates of `layers.caches.attention_gate` for a model, and of each step the loss of tokens and the share that is kept.

        loss = mean -log p + weight | mean_{layers, heads, tokens} m - keep |,    m = 1 if sigmoid(z) > 1/2 and 0 otherwise
        dm / dz = sigmoid'(z)

    as in Attention-Gate (Zeng et al. 2024, arXiv:2410.12876), whose gradients pass straight through the threshold. The model does not
    change. `Trained.save` writes a file for `cache="attention_gate(gates=...)"`. Memory grows with t^2 and the heads of the model.

    Args:
      model: a language model with attention to all tokens.
      tokens: rows without padding.

    Raises:
      ValueError, TypeError: the model has no layer with a cache of all tokens, or tokens are no rows of two or more of its
        vocabulary.
    """
    config = GatingConfig() if config is None else config
    tokens = read_rows(model, tokens, least=2)
    caching.check(model, Watching(length=1), tokens.shape[1], 1, name=None)
    parameters = []
    for number, mixer in enumerate(caching.layers_of(model).values()):
        sizes = mixer.config
        features = (sizes.heads + 2 * sizes.groups) * sizes.size
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number), 4)
        shape, scale = (features, config.heads, config.width), features**-0.5
        made = {
            name: scale * jax.random.normal(key, shape)
            for name, key in zip(("query", "key", "value"), keys[:3], strict=True)
        }
        back = (config.heads, config.width, sizes.groups)
        made["output"] = (config.heads * config.width) ** -0.5 * jax.random.normal(keys[3], back)
        parameters.append(made | {"bias": jnp.ones(sizes.groups)})
    optimizer = optax.adamw(config.learning_rate)
    state, found = optimizer.init(parameters), []
    options = (optimizer, config.keep, config.weight)
    for chosen in shuffled(tokens, steps=config.steps, batch=config.batch, seed=config.seed):
        parameters, state, one = _step(*options, model, parameters, state, jnp.asarray(chosen))
        found.append(np.asarray(one))
    return Trained(parameters), np.stack(found)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(optimizer, keep, weight, model, parameters, state, tokens):
    """Returns the parameters and the state of the optimizer after a step, and the losses before it."""

    def loss_of(parameters):
        loss, share = losses(model, parameters, tokens)
        return loss + weight * jnp.abs(share - keep), jnp.stack([loss, share])

    gradients, found = jax.grad(loss_of, has_aux=True)(parameters)
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state, found


def losses(
    model: LanguageModel, parameters: list[dict[str, Array]], tokens: Int[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean of -log p of tokens given those before them, and the share of tokens that gates keep."""
    layers = list(caching.layers_of(model))
    begun = caching.begin(model, Watching(length=1), *tokens.shape)
    none = jnp.zeros((), jnp.float32)
    gated = {layer: Straight(one, none) for layer, one in zip(layers, parameters, strict=True)}
    logits, state = model(tokens, caching.with_carried(begun, gated))
    chances = jax.nn.log_softmax(logits[:, :-1], axis=2)
    loss = -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=2).mean()
    return loss, jnp.stack([state.layers[layer].carried.share for layer in layers]).mean()


@partial(jax.tree_util.register_dataclass, data_fields=["arrays", "share"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Straight(CacheState):
    """Gates in training, which read whole rows in one call.

    Attributes:
      arrays: of the gates.
      share: share of the tokens that they keep, after the call.
    """

    arrays: dict[str, Any]
    share: Any

    @property
    def slots(self) -> int:
        return 0

    def like(self, cache: Cache) -> CacheState:
        return self

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Straight"]:
        query, *entries = projected(self.arrays, features_of(view, q, k, v, visit.positions))
        seen = Seen(tuple(entries), visit.numbers, visit.positions)
        chance = jax.nn.sigmoid(gate_logits(self.arrays, query, seen, visit))
        kept = jnp.where(chance > 0.5, 1.0, 0.0) + chance - jax.lax.stop_gradient(chance)
        numbers, positions = visit.numbers, visit.positions
        bias = view.bias(numbers, positions, numbers[..., None], positions[..., None])
        logits = view.products(q, k, bias)
        top = logits.max(3, keepdims=True)
        own = jnp.eye(q.shape[1], dtype=bool)[None, None]
        weights = jnp.where(own, 1.0, to_heads(jnp.moveaxis(kept, 2, 1), q.shape[2])[:, :, None])
        weights *= jnp.exp(logits - top)
        total = weights.sum(3, keepdims=True)
        if (sinks := view.logits.sink_logits) is not None:
            total += jnp.exp(sinks.astype(jnp.float32)[None, :, None, None] - top)
        values = to_heads(jnp.moveaxis(v, 2, 1), q.shape[2]).astype(jnp.float32)
        o = jnp.einsum("bhts,bhsv->bthv", weights / total, values, precision=jax.lax.Precision.HIGHEST)
        return o.astype(v.dtype), dataclasses.replace(self, share=kept.mean())
