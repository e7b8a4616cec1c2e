"""The scale of activations and gradients by layer at initialization, where exploding and vanishing ones are seen."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from layers.typing import Array
from seqmodels import DualEncoder, Regressor, ReplacedTokenDetector, build_model
from seqmodels.config import StackConfig
from seqmodels.dual_encoder import as_rows


class Scale(NamedTuple):
    """Root mean squares at one place of a model.

    Attributes:
      place: "embedding", "layer N" or "logits".
      activation: of the output of that place.
      gradient: of the gradient of the loss, summed over the labels, by that output.
    """

    place: str
    activation: float
    gradient: float


class _Shift(nnx.Variable):
    """Zeros that are added to activations: the gradient by them is the gradient by the activations."""


class _Shifted(nnx.Module):
    """A stack with shifted inputs, or a block with shifted outputs."""

    def __init__(self, inner: nnx.Module, shape: tuple[int, ...], dtype: jnp.dtype):
        self.inner = inner
        self.shift = _Shift(jnp.zeros(shape, dtype))

    @property
    def mixer(self) -> nnx.Module:
        """The mixer of the block, which the stack asks what it takes."""
        return self.inner.mixer

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        return self.inner(x + self.shift[...], *args, **kwargs)

    def sharing(self, x: Array, *args: Any, **kwargs: Any) -> tuple[Array, Any, Any]:
        y, *rest = self.inner.sharing(x, *args, **kwargs)
        return y + self.shift[...], *rest


def scales(values: Mapping[str, Any], *, batch: int, length: int, seed: int) -> list[Scale]:
    """Returns the scale after the embedding, after each layer and of the logits, of a model with random parameters.

    Inputs and labels are random too, and the loss is the cross-entropy of all logits, or half the squared error of a regressor.
    Norms take the statistics of the batch, as in training; dropout and the route past layers are left out.

    Args:
      values: the section `model` with its sizes, for `build_model`.
      batch, length: number of rows and of tokens per row.
      seed: seed of parameters, inputs and labels.

    Raises:
      ValueError: layers of the model share blocks, or it is an encoder-decoder.
    """
    if (kind := values.get("kind")) in ("encoder_decoder", "pointer_network"):
        raise ValueError(f"kind={kind!r} has two stacks, and scales are those of one; expected another kind")
    plain = {"scan": False, "dropout": 0.0, "route": None, "route_rate": StackConfig.route_rate}
    model = build_model({**values, **plain}, rngs=nnx.Rngs(seed))
    if model.stack.config.residual == "reversible":
        raise ValueError(
            "residual='reversible' has two streams, and scales are those of one; expected another residual"
        )
    if isinstance(model, ReplacedTokenDetector):
        raise ValueError(
            "kind='replaced_token_detector' is two models, and scales are those of one; expected 'masked_language_model'"
        )
    if model.stack.uses:
        raise ValueError(
            f"shared.layers={model.stack.uses} read shared blocks, which scales by layer leave out; expected shared=None"
        )
    keys = jax.random.split(jax.random.key(seed), 3)
    input_config, config = model.config.input, model.stack.config
    rows = (batch, 2) if isinstance(model, DualEncoder) else (batch,)
    if input_config.vocab_size is None:
        inputs = jax.random.normal(keys[0], (*rows, length, input_config.input_size))
    else:
        inputs = jax.random.randint(keys[0], (*rows, length), 0, input_config.vocab_size)
    activations = _activations(model, as_rows(inputs) if len(rows) == 2 else inputs, keys[1])
    shape, dtype = (math.prod(rows), length, config.width), jnp.dtype(config.dtype)
    places = ("embedding", *(f"layer {layer}" for layer in range(config.depth)))
    model.stack.blocks = nnx.List(_Shifted(block, shape, dtype) for block in model.stack.blocks)
    model.stack = _Shifted(model.stack, shape, dtype)
    graph, shifts, rest = nnx.split(model, _Shift, ...)

    def loss(logits):
        if isinstance(model, Regressor):
            return jnp.sum(jnp.square(logits - jax.random.normal(keys[2], logits.shape))) / 2
        labels = jax.random.randint(keys[2], logits.shape[:-1], 0, logits.shape[-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    # Norms update their statistics, so that these are arguments of the function that is differentiated.
    def run(shifts, rest):
        logits = nnx.merge(graph, shifts, rest, copy=True)(inputs, key=keys[1])[0].astype(jnp.float32)
        return loss(logits), logits

    by_shifts, logits = jax.jit(jax.grad(run, has_aux=True))(shifts, rest)
    by_logits = jax.grad(loss)(logits)
    found = nnx.merge(graph, by_shifts, rest)
    by_place = [m.shift[...] for m in (found.stack, *found.stack.inner.blocks)]
    rows = zip(places, activations, by_place, strict=True)
    return [Scale(place, _rms(x), _rms(g)) for place, x, g in rows] + [
        Scale("logits", _rms(logits), _rms(by_logits))
    ]


def _activations(model: nnx.Module, inputs: Array, key: Array) -> list[Array]:
    """Returns the outputs of the embedding and of each layer."""
    graph, variables = nnx.split(model)

    @jax.jit
    def outputs(variables):
        merged = nnx.merge(graph, variables, copy=True)
        found, values = [merged.embedding(inputs)[0]], None
        for block in merged.stack.blocks:
            x, _, values = block.sharing(found[-1], None, values, key=key)
            found.append(x)
        return found

    return outputs(variables)


def _rms(x: Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))
