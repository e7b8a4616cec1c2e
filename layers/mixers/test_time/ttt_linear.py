"""TTT-Linear: a linear model trained by gradient steps on the tokens themselves (Sun et al. 2024, arXiv:2407.04620)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.heads import HeadLayerNorm, head_size, join_heads, split_heads
from layers.parts.mini_batches import MiniBatches
from layers.parts.short_convolution import ShortConvolution
from layers.positions.rotary import rotary
from layers.segments import Segments, keep_where
from layers.typing import Array, Float, Int


@checked_dataclass
class TTTLinearConfig:
    """Options of `TTTLinear`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads, each with a model of its own.
      head_dim: K, features per head, an even number; width / heads if None.
      mini_batch: c, tokens whose gradients are taken at the same weights.
      rate: factor of the learning rates of the inner steps.
      taps: number of taps of the short convolutions of queries and keys, 2 to 8.
      epsilon: epsilon of the norms.
      dtype: dtype of the activations; inner model and gradients are float32.
    """

    width: int
    heads: int = 4
    head_dim: int | None = None
    mini_batch: int = 16
    rate: NonNegative = 1.0
    taps: int = 4
    epsilon: NonNegative = 1e-6
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ValueError(
                f"head_dim={self.size}; rotary positions need an even number of features per head"
            )
        if self.mini_batch < 1:
            raise ValueError(f"mini_batch={self.mini_batch}; expected at least 1")

    @property
    def size(self) -> int:
        """K."""
        return head_size("head_dim", self.head_dim, self)


class Model(NamedTuple):
    """An inner model or a sum of its gradients: weight W and bias b per head."""

    weight: Float[Array, "b h k k"]
    bias: Float[Array, "b h k"]


class TTTLinearCarry(NamedTuple):
    """What `TTTLinear` carries, float32.

    Attributes:
      inputs: the last inputs of its convolutions.
      model: the inner model where the current mini-batch begins.
      gradient: the sum of the gradients of the current mini-batch, each times its token's rate.
      place: number of tokens of the current mini-batch.
    """

    inputs: Float[Array, "b w-1 n"]
    model: Model
    gradient: Model
    place: Int[Array, "b"]


class TTTLinear(Mixer):
    """TTT-Linear: the state is a model f, which learns to reconstruct v_t from k_t (Sun et al. 2024, arXiv:2407.04620).

        q, k = rotary(conv_q(W_u x)), rotary(conv_k(W_u x)),   v = W_v x            positions modulo c
        f(z; W, b) = z + LN(z W + b),     l_t(W, b) = 1/2 |LN(k_t W + b) - (v_t - k_t)|^2     per head
        G_t = sum_j sigmoid(w_r x_j + b_r) grad l_j(W_0, b_0) / K                   over j <= t of the mini-batch
        (W_t, b_t) = (W_0, b_0) - rate max(1 / i_t + s_{i_t}, 0) G_t,   o_t = f(q_t; W_t, b_t)
        y = W_o (LayerNorm(o) * gelu(W_g x))

    The tokens of a segment form mini-batches of c. W_0 and b_0 are what the mini-batch before ended with, and before the first one
    they are parameters, normal with deviation 0.02 and zero; i_t counts from 1 in each mini-batch, and s starts at zero. The norm
    LN has a scale and a bias per head. Products within a mini-batch stand for the weights after every token. Mini-batches
    follow each other in a loop.
    """

    isolates_tokens = True

    def __init__(self, config: TTTLinearConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads, size = config.heads, config.size
        features = heads * size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.shared = linear(config.width, features, **options)
        self.value = linear(config.width, features, **options)
        self.gate = linear(config.width, features, **options)
        filtering = {"activation": None, "axis": "heads", "bias": True, "dtype": config.dtype, "rngs": rngs}
        self.query_filter = ShortConvolution(features, config.taps, **filtering)
        self.key_filter = ShortConvolution(features, config.taps, **filtering)
        self.token_rate = linear(config.width, heads, **options | {"bias": True})
        zeros, ones, normal = (
            nnx.initializers.zeros_init(),
            nnx.initializers.ones_init(),
            nnx.initializers.normal(0.02),
        )
        by_head = {"axes": ("heads", None), **NO_DECAY}
        self.weight = parameter(rngs, normal, (heads, size, size), axes=("heads", None, None))
        self.bias = parameter(rngs, zeros, (heads, size), **by_head)
        self.scale = parameter(rngs, ones, (heads, size), **by_head)
        self.shift = parameter(rngs, zeros, (heads, size), **by_head)
        self.place_rate = parameter(rngs, zeros, (config.mini_batch,), **NO_DECAY)
        self.norm = HeadLayerNorm(1, features, epsilon=config.epsilon, rngs=rngs)
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> TTTLinearCarry:
        model = Model(*(self._by_row(part[...], batch_size) for part in (self.weight, self.bias)))
        place = jnp.zeros((batch_size,), jnp.int32)
        inputs = self.query_filter.init_state(batch_size)
        return TTTLinearCarry(inputs, model, jax.tree.map(jnp.zeros_like, model), place)

    def mix(
        self, x: Float[Array, "b t d"], carried: TTTLinearCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], TTTLinearCarry]:
        config = self.config
        fresh = self.initial(x.shape[0], None)
        known = fresh if carried is None else carried
        tokens = MiniBatches(x.shape[1], config.mini_batch, known.place, segments, whole=carried is None)
        u = self.shared(x)
        q, inputs = self.query_filter(u, known.inputs, segment_ids=segments)
        k, _ = self.key_filter(u, known.inputs, segment_ids=segments)
        q, k, v = (split_heads(part, config.heads).astype(jnp.float32) for part in (q, k, self.value(x)))
        q, k = (rotary(part, tokens.places) for part in (q, k))
        token_rates = jax.nn.sigmoid(self.token_rate(x).astype(jnp.float32)) / config.size

        def step(before, batch):
            q, k, v, rates, live, begins = batch
            before = keep_where(~begins, before, (fresh.model, fresh.gradient))
            return self._descend(*before, q, k, v, rates, live)

        batches = (*(tokens.gather(part) for part in (q, k, v, token_rates)), tokens.live, tokens.begins)
        (model, gradient), o = jax.lax.scan(step, (known.model, known.gradient), batches)
        o = join_heads(tokens.scatter(o))
        y = self.norm(o[:, :, None]) * jax.nn.gelu(self.gate(x).astype(jnp.float32))
        return self.output(y.astype(config.dtype)), TTTLinearCarry(inputs, model, gradient, tokens.last)

    def _descend(self, model, gradient, q, k, v, rates, live):
        """Returns the model and gradients after a mini-batch, and its outputs; q, k, v are (b, c, h, k)."""
        config = self.config
        scale = self.scale[...][None, None]
        z, deviation = self._normalized(jnp.einsum("bchk,bhkl->bchl", k, model.weight) + model.bias[:, None])
        error = scale * (scale * z + self.shift[...][None, None] - (v - k))
        # Backward through the norm.
        through = error - error.mean(-1, keepdims=True) - z * (error * z).mean(-1, keepdims=True)
        steps = jnp.where(live[..., None, None], rates[..., None] * through / deviation, 0)
        count = jnp.arange(1, config.mini_batch + 1, dtype=jnp.float32)
        places = config.rate * jnp.maximum(1 / count + self.place_rate[...], 0)
        earlier = jnp.tril(jnp.ones((config.mini_batch, config.mini_batch), bool))[None, None]
        scores = jnp.where(earlier, jnp.einsum("bihk,bjhk->bhij", q, k) + 1, 0)
        summed = jnp.einsum("bhij,bjhk->bihk", scores, steps)
        summed = summed + jnp.einsum("bchk,bhkl->bchl", q, gradient.weight) + gradient.bias[:, None]
        read = jnp.einsum("bchk,bhkl->bchl", q, model.weight) + model.bias[:, None]
        read, _ = self._normalized(read - places[None, :, None, None] * summed)
        o = q + scale * read + self.shift[...][None, None]
        gradient = Model(
            gradient.weight + jnp.einsum("bchk,bchl->bhkl", k, steps), gradient.bias + steps.sum(1)
        )
        descended = jax.tree.map(lambda part, slope: part - places[-1] * slope, model, gradient)
        ended = (descended, jax.tree.map(jnp.zeros_like, gradient))
        return keep_where(live[:, -1], ended, (model, gradient)), o

    def _normalized(self, z):
        """Returns z less its mean and divided by its deviation, and the deviation."""
        z = z - z.mean(-1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(z).mean(-1, keepdims=True) + self.config.epsilon)
        return z / deviation, deviation

    def _by_row(self, part, batch_size):
        return jnp.broadcast_to(part[None], (batch_size, *part.shape))
