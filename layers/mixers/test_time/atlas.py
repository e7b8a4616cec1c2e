"""ATLAS: Titans' memory, trained on a window of polynomial features by Muon (Behrouz et al. 2025, arXiv:2505.23735)."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.mixers.test_time.titans import Titans, TitansConfig
from layers.options import checked_dataclass
from layers.parameters import NO_DECAY, declared
from layers.segments import keep_where
from layers.typing import Array, Bool, Float

# Coefficients of a Newton-Schulz step, and what is added to squared norms.
STEP, SMALL = (3.4445, -4.7750, 2.0315), 1e-12


@checked_dataclass
class AtlasConfig(TitansConfig):
    """Options of `Atlas`: those of `TitansConfig` and more.

    Attributes:
      rate: c times the largest learning rate, where c is `chunk`.
      window: w, tokens whose losses the memory descends at every token.
      degree: p, degree of the features of queries and keys, 1 or 2.
      steps: steps of Newton-Schulz.
    """

    window: int = 8
    degree: Literal[1, 2] = 2
    steps: int = 5

    @property
    def features(self) -> int:
        """F, rows of the memory."""
        return self.size if self.degree == 1 else self.size + self.size * (self.size + 1) // 2


class Window(NamedTuple):
    """The memory of Titans, and the last w - 1 keys, values and weights, which are zero before the first token."""

    start: Float[Array, "b h f v"]
    memory: Float[Array, "b h f v"]
    surprise: Float[Array, "b h f v"]
    keys: Float[Array, "b m h k"]
    values: Float[Array, "b m h v"]
    weights: Float[Array, "b m h"]


class Atlas(Titans):
    """ATLAS with one matrix per head: the Omega rule, polynomial features and Muon (Behrouz et al. 2025, arXiv:2505.23735).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        theta, eta, alpha, gamma = sigmoid(W x + b), with eta times rate / c, alpha = sigmoid(-(W x + b))  (h) each
        phi(k) = [a_1 k_i, a_2 k_i k_j for i <= j]                                    (F) monomials up to the degree
        L_t(M) = sum_{i=t-w+1}^t gamma_i |M^T phi(k_i) - v_i|^2,   S_t = theta_t S_{t-1} + grad L_t(M_0)
        M_t = alpha_t M_{t-1} - eta_t NS(S_t),   o_t = M_t^T phi(q_t)
        NS: X = S / |S|,  then 5 times X = 3.4445 X - 4.7750 A X + 2.0315 A^2 X with A = X X^T: about the nearest orthogonal matrix
        y = W_o (RMSNorm(o) * silu(W_g x))                                            norm per head

    M_0 is the memory where a chunk of c tokens of a segment begins; windows reach into the chunk before, with losses at M_0 too. The
    tokens of a chunk have a matrix S_t each, which are orthogonalized together, and chunks follow each other in a loop. The coefficients
    a_p are learned and start at 1 / p!, as those of the exponential; biases start at 0, 0, -4 and 0. The paper's memories have more layers
    too. There is no code of the authors, and the paper leaves the maps to gamma and the range of eta open: these are ours.
    """

    rate_biases = (0.0, 0.0, -4.0, 0.0)

    def __init__(self, config: AtlasConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        taylor = jnp.asarray([1 / math.factorial(p + 1) for p in range(config.degree)], jnp.float32)
        self.coefficients = declared(taylor, axes=(None,), **NO_DECAY)

    def empty(self, batch_size: int) -> Window:
        config = self.config
        zero = jnp.zeros((batch_size, config.heads, config.features, config.size), jnp.float32)
        past = jnp.zeros((batch_size, config.window - 1, config.heads, config.size), jnp.float32)
        return Window(zero, zero, zero, past, past, past[..., 0])

    def in_chunks(
        self, rates: tuple[Float[Array, "n b c h"], ...], live: Bool[Array, "n b c"]
    ) -> tuple[Array, ...]:
        theta, eta, alpha, gamma = rates
        eta = self.config.rate / self.config.chunk * jax.nn.sigmoid(eta)
        return jax.nn.log_sigmoid(theta), eta, jax.nn.log_sigmoid(-alpha), jax.nn.sigmoid(gamma)

    def descend(
        self, memory: Window, q: Array, k: Array, v: Array, live: Bool[Array, "b c"], *rest: Array
    ) -> tuple[Window, Float[Array, "b c h v"]]:
        count = live.shape[1]
        # Where the call begins inside a chunk, its tokens go to the first places.
        first = jnp.argmax(live, axis=1)

        def turned(x, by):
            index = (jnp.arange(count)[None] + by[:, None]) % count
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

        q, k, v, live, log_theta, eta, log_alpha, gamma = (turned(x, first) for x in (q, k, v, live, *rest))
        real = live[..., None]
        log_theta, eta, log_alpha = (jnp.where(real, x, 0) for x in (log_theta, eta, log_alpha))
        new = (k, v, jnp.where(real, gamma, 0))
        k, v, gamma = (jnp.concatenate(pair, axis=1) for pair in zip(memory[3:], new, strict=True))
        phi = self.polynomial(k)
        error = jnp.einsum("bihf,bhfv->bihv", phi, memory.start) - v
        # Row t of `seen` is the window of token t: itself and the w - 1 before it.
        past = jnp.arange(k.shape[1])[None, None] - jnp.arange(count)[None, :, None]
        seen = real & (past >= 0) & (past < self.config.window)
        kept, sums = _unrolled(log_theta)
        of_losses = jnp.einsum("bhts,bsi->bhti", sums, seen.astype(jnp.float32))
        surprise = jnp.einsum("bhti,bihf,bihv->bhtfv", of_losses, phi, 2 * gamma[..., None] * error)
        surprise = surprise + kept[..., None, None] * memory.surprise[:, :, None]
        kept, sums = _unrolled(log_alpha)
        sums = sums * jnp.moveaxis(eta, 2, 1)[:, :, None]
        moved = jnp.einsum("bhts,bhsfv->bhtfv", sums, orthogonalized(surprise, self.config.steps))
        after = kept[..., None, None] * memory.memory[:, :, None] - moved
        o = jnp.einsum("bthf,bhtfv->bthv", self.polynomial(q), after)
        last = after[:, :, -1]
        index = live.sum(1)[:, None] + jnp.arange(self.config.window - 1)[None]
        past = (
            jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
            for x in (k, v, gamma)
        )
        full = live.sum(1) + first == count
        start = keep_where(full, last, memory.start)
        return Window(start, last, surprise[:, :, -1], *past), turned(o, -first)

    def polynomial(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h f"]:
        """Returns the monomials of the features of each head up to the degree, times the coefficients."""
        first, *second = self.coefficients[...]
        if not second:
            return first * x
        i, j = np.triu_indices(x.shape[3])
        return jnp.concatenate([first * x, second[0] * x[..., i] * x[..., j]], axis=-1)


def _unrolled(log_decay: Float[Array, "b c h"]) -> tuple[Float[Array, "b h c"], Float[Array, "b h c c"]]:
    """Returns the weights of y_0 and of each u_s in y_t = exp(log_decay_t) y_{t-1} + u_t."""
    total = jnp.cumsum(jnp.moveaxis(log_decay, 2, 1), axis=2)
    difference = total[..., :, None] - total[..., None, :]
    earlier = jnp.tri(total.shape[2], dtype=bool)[None, None]
    return jnp.exp(total), jnp.where(earlier, jnp.exp(jnp.where(earlier, difference, 0)), 0)


def orthogonalized(x: Float[Array, "*b f v"], steps: int) -> Float[Array, "*b f v"]:
    """Returns about the nearest matrix with orthonormal rows or columns: singular values near 1, and zero for a zero matrix."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else jnp.swapaxes(x, -1, -2)
    x = x * jax.lax.rsqrt(jnp.square(x).sum((-2, -1), keepdims=True) + SMALL)
    a, b, c = STEP
    for _ in range(steps):
        square = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else jnp.swapaxes(x, -1, -2)
