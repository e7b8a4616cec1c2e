"""Titans' neural memory of one matrix: gradient descent with momentum and decay (Behrouz et al. 2024, arXiv:2501.00663)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear
from layers.parts.heads import HeadNorm, head_size, split_heads, unit
from layers.parts.mini_batches import MiniBatches
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments, keep_where
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class TitansConfig:
    """Options of `Titans`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads, each with a memory of its own.
      head_dim: K, features per head; width / heads if None.
      chunk: c, tokens whose gradients are taken at the same memory; 1 takes each at the memory before its token.
      rate: c times the largest learning rate, so that gradients at one memory do not overshoot together.
      taps: number of taps of the short convolution, 2 to 8.
      epsilon: epsilon of the norm per head.
      dtype: dtype of the activations; memory and gradients are float32.
    """

    width: int
    heads: int = 4
    head_dim: int | None = None
    chunk: int = 16
    rate: NonNegative = 1.0
    taps: int = 4
    epsilon: NonNegative = 1e-5
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}; expected at least 1")
        _ = self.size

    @property
    def size(self) -> int:
        """K."""
        return head_size("head_dim", self.head_dim, self)


class Memory(NamedTuple):
    """The memory where the current chunk begins, the memory M and the surprise S, per head."""

    start: Float[Array, "b h k v"]
    memory: Float[Array, "b h k v"]
    surprise: Float[Array, "b h k v"]


class TitansCarry(NamedTuple):
    """What `Titans` carries: the last inputs of its convolution, its memory, and the tokens of the current chunk."""

    inputs: Float[Array, "b w-1 n"]
    memory: tuple[Array, ...]
    place: Int[Array, "b"]


class Titans(Mixer):
    """Titans' long-term memory with one matrix per head (Behrouz et al. 2024, arXiv:2501.00663).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        eta, theta, alpha = sigmoid(W x + b), with theta times rate / c               (h) each
        l_t(M) = |M^T k_t - v_t|^2,   S_t = eta_t S_{t-1} - theta_t grad l_t(M_0)
        M_t = (1 - alpha_t) M_{t-1} + S_t,   o_t = M_t^T q_t
        y = W_o (RMSNorm(o) * silu(W_g x))                                            norm per head

    M_0 is the memory where a chunk of c tokens of a segment begins. Products within a chunk stand for the memory after every
    token, and chunks follow each other in a loop. The biases start at 0, 0 and -4. The paper's memories have more layers too, and
    it names no range of the learning rate.
    """

    isolates_tokens = True
    # Where the biases of eta, theta and alpha start.
    rate_biases = (0.0, 0.0, -4.0)

    def __init__(self, config: TitansConfig, *, rngs: nnx.Rngs):
        self.config = config
        features = config.heads * config.size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.projection = linear(config.width, 3 * features, **options)
        self.convolution = ShortConvolution(
            3 * features, config.taps, axis="heads", dtype=config.dtype, rngs=rngs
        )
        self.rates = linear(config.width, len(self.rate_biases) * config.heads, **options)
        starts = jnp.repeat(jnp.asarray(self.rate_biases, jnp.float32), config.heads)
        self.rate_bias = declared(starts, axes=("heads",), **NO_DECAY)
        self.gate = linear(config.width, features, **options)
        self.norm = HeadNorm(config.size, gate="silu", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> TitansCarry:
        place = jnp.zeros((batch_size,), jnp.int32)
        return TitansCarry(self.convolution.init_state(batch_size), self.empty(batch_size), place)

    def empty(self, batch_size: int) -> tuple[Array, ...]:
        """Returns the memory where a segment begins."""
        size = self.config.size
        zero = jnp.zeros((batch_size, self.config.heads, size, size), jnp.float32)
        return Memory(zero, zero, zero)

    def mix(
        self, x: Float[Array, "b t d"], carried: TitansCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], TitansCarry]:
        config = self.config
        fresh = self.initial(x.shape[0], None)
        known = fresh if carried is None else carried
        chunks = MiniBatches(x.shape[1], config.chunk, known.place, segments, whole=carried is None)
        features, inputs = self.convolution(self.projection(x), known.inputs, segment_ids=segments)
        q, k, v = (split_heads(part, config.heads) for part in jnp.split(features, 3, axis=-1))
        rates = self.rates(x).astype(jnp.float32) + self.rate_bias[...][None, None]
        rates = tuple(chunks.gather(part) for part in jnp.split(rates, len(self.rate_biases), axis=-1))

        def step(memory, inputs):
            begins, *inputs = inputs
            return self.descend(keep_where(~begins, memory, fresh.memory), *inputs)

        parts = (chunks.gather(part) for part in (unit(q), unit(k), v.astype(jnp.float32)))
        given = (chunks.begins, *parts, chunks.live, *self.in_chunks(rates, chunks.live))
        memory, o = jax.lax.scan(step, known.memory, given)
        y = self.norm(chunks.scatter(o), self.gate(x))
        return self.output(y), TitansCarry(inputs, memory, chunks.last)

    def in_chunks(
        self, rates: tuple[Float[Array, "n b c h"], ...], live: Bool[Array, "n b c"]
    ) -> tuple[Array, ...]:
        """Returns what `descend` takes behind q, k, v and the live tokens, for all chunks at once, from the logits of the rates."""
        eta, theta, alpha = (jax.nn.sigmoid(rate) for rate in rates)
        return self.config.rate / self.config.chunk * theta, *_weights(eta, alpha, live)

    def descend(
        self, memory: tuple[Array, ...], q: Array, k: Array, v: Array, live: Bool[Array, "b c"], *rest: Array
    ) -> tuple[tuple[Array, ...], Float[Array, "b c h v"]]:
        """Returns the memory after a chunk, and its outputs; q, k and v are (b, c, h, k)."""
        theta, *weights = rest
        return _descend(memory, q, k, v, theta, weights, live)


def _weights(eta, alpha, live):
    """Weights of what a chunk begins with and of its gradients, in the memory and in the surprise after every token.

    Args:
      eta, alpha: (n, b, c, h).
      live: (n, b, c).

    Returns:
      (n, b, h, c, c + 2) twice, for the memory before, the surprise before and the c gradients.
    """
    n, b, c, h = eta.shape
    of_memory, of_surprise, *_ = units = jnp.eye(c + 2, dtype=jnp.float32)

    def step(before, inputs):
        eta, alpha, live, own = inputs
        memory, surprise = before
        moved = eta[..., None] * surprise + own[None, None, None]
        after = (1 - alpha[..., None]) * memory + moved, moved
        after = tuple(
            jnp.where(live[..., None, None], new, old) for new, old in zip(after, before, strict=True)
        )
        return after, after

    start = tuple(
        jnp.broadcast_to(part[None, None, None], (n, b, h, c + 2)) for part in (of_memory, of_surprise)
    )
    inputs = (jnp.moveaxis(eta, 2, 0), jnp.moveaxis(alpha, 2, 0), jnp.moveaxis(live, 2, 0), units[2:])
    _, after = jax.lax.scan(step, start, inputs)
    return tuple(jnp.moveaxis(part, 0, 3) for part in after)


def _descend(memory, q, k, v, theta, weights, live):
    """Returns the memory after a chunk, and its outputs; q, k, v are (b, c, h, k)."""
    in_memory, in_surprise = weights
    error = jnp.einsum("bchk,bhkv->bchv", k, memory.start) - v
    steps = jnp.where(live[..., None, None], -2 * theta[..., None] * error, 0)
    before = jnp.stack([memory.memory, memory.surprise])
    scores = in_memory[..., 2:] * jnp.einsum("bihk,bjhk->bhij", q, k)
    o = jnp.einsum("bhij,bjhv->bihv", scores, steps)
    o = o + jnp.einsum("bchk,sbhkv,bhcs->bchv", q, before, in_memory[..., :2])

    def last(weights):
        weights = weights[:, :, -1]
        kept = jnp.einsum("sbhkv,bhs->bhkv", before, weights[..., :2])
        return kept + jnp.einsum("bjhk,bhj,bjhv->bhkv", k, weights[..., 2:], steps)

    after, surprise = last(in_memory), last(in_surprise)
    return Memory(keep_where(live[:, -1], after, memory.start), after, surprise), o
