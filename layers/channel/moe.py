"""Mixture of experts: a router chooses a few of many gated linear units for each token."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers.channel.glu import ACTIVATIONS, GLU, MLP, MLPConfig
from layers.dropout import dropout
from layers.kernels.sizes import known
from layers.options import ActivationDtype, Count, Fraction, NonNegative, Positive, checked_dataclass
from layers.parameters import NO_DECAY, AuxiliaryLoss, linear, parameter
from layers.registry import choose
from layers.segments import select_masked
from layers.typing import Array, Bool, Float, Int, Key

# The leading axis counts experts: each expert's matrix is initialized on its own.
_lecun_normal = nnx.initializers.lecun_normal(batch_axis=(0,))


# The most tokens for which, outside training, every expert is run: products with so few cost what the matrices take to read.
FEW = 64
SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


@checked_dataclass
class MoEConfig:
    """Options of `MoE`.

    Attributes:
      width: d, number of input and output features.
      experts: E, number of experts.
      top_k: k, number of experts per token.
      hidden: inner width per expert; 8/3 width rounded up to a multiple of `multiple_of` if None.
      latent: features that experts read and give, between two maps that they share (Nemotron-H with moe_latent_size); the width,
        without these maps, if None. The router and the shared experts read all features.
      shared: number of further experts that every token takes, computed as one expert of `shared` times the inner width.
      shared_gate: whether a sigmoid of the token weighs the shared experts (Qwen3-Next).
      scores: function from the router's logits to scores: "softmax" over the experts, or "sigmoid" (DeepSeek-V3).
      normalize: whether the weights of the chosen experts are divided by their sum. Not with top_k=1, where the weight
        would always be 1 and the router would learn nothing from the output.
      scale: factor on the weights of the chosen experts.
      groups: number of equal groups of neighboring experts; 1 for none.
      top_groups: number of groups whose experts a token may take: those with the largest sum of their two best scores.
      bias_rate: step by which a call in training moves the bias of each expert's score towards even loads; 0 for no bias.
        DeepSeek-V3 uses 0.001.
      balance: coefficient of the load-balancing loss.
      z_loss: coefficient of the loss that keeps the router's logits small; sigmoid routers have none in the papers.
      compute: "grouped" runs each expert on its own tokens, "dense" runs every expert on all tokens, "picked" reads the
        matrices of each token's experts anew; the outputs are the same. None takes "dense" if a token takes half of the
        experts or more, else "grouped"; outside training, where few tokens cost what is read of the matrices, "picked" if
        they take half of all experts at most, and else "dense" for up to 64 tokens.
      bias: whether the router and the experts have biases (gpt-oss).
      gated: whether experts are gated linear units; otherwise they are perceptrons of one layer inside (Nemotron-H).
      activation: of gates, or of what is inside perceptrons: one of `layers.channel.glu.ACTIVATIONS`; silu if None.
      gain: a in the experts' activation x sigmoid(a x); 1 is silu. gpt-oss has 1.702.
      clamp: bound of gates from above and of inputs on both sides before they are multiplied; None for none. gpt-oss has 7.
      offset: number added to inputs before they are multiplied by gates; gpt-oss has 1.
      dropout: dropout rate of the hidden features, in training.
      dtype: dtype of the activations; the router computes in float32.
    """

    width: int
    experts: int = 8
    top_k: int = 2
    hidden: int | None = None
    latent: int | None = None
    shared: Count = 0
    shared_gate: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: Positive = 1.0
    groups: int = 1
    top_groups: int = 1
    bias_rate: NonNegative = 0.0
    balance: NonNegative = 0.01
    z_loss: NonNegative = 0.001
    compute: Literal["grouped", "dense", "picked"] | None = None
    multiple_of: int = 8
    bias: bool = False
    gated: bool = True
    activation: str | None = None
    gain: Positive = 1.0
    clamp: Positive | None = None
    offset: float = 0.0
    dropout: Fraction = 0.0
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}; expected 1 to experts={self.experts}")
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "top_k=1 with normalize=True gives every expert the weight 1 and the router no gradient; "
                "set normalize=False"
            )
        shaped = {"gain": self.gain != 1, "clamp": self.clamp is not None, "offset": self.offset != 0}
        if (changed := [name for name in shaped if shaped[name]]) and (not self.gated or self.activation):
            raise ValueError(
                f"{changed[0]}={getattr(self, changed[0])} with gated={self.gated} and activation={self.activation!r}; "
                "it is an option of gates by silu"
            )
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate=True needs shared experts; set shared to 1 or more")
        if self.experts % self.groups:
            raise ValueError(f"groups={self.groups} cannot share experts={self.experts} equally")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"top_groups={self.top_groups}; expected 1 to groups={self.groups}")
        reach = self.top_groups * (self.experts // self.groups)
        if self.top_k > reach:
            raise ValueError(f"top_k={self.top_k}, but top_groups={self.top_groups} leave {reach} experts")


class MoE(nnx.Module):
    """MoE: a mixture of experts that drops no token (Shazeer et al. 2017, arXiv:1701.06538).

        p = softmax(W x) or sigmoid(W x)                       E scores, float32
        T = top-k of p + b                                     b in R^E, or none
        y = sum_{e in T} w_e GLU_e(x) + g GLU_shared(x),       w_e = scale p_e, or scale p_e / sum_T p
        auxiliary = balance E sum_e f_e P_e + z_loss mean logsumexp(W x)^2

    where with `latent` the sum is B sum_{e in T} w_e GLU_e(A x),
    with GLU_e(x) = D_e (silu(G_e x) * U_e x), or D_e f(U_e x) without gates, with biases and another product as configured,
    and g = 1 or sigmoid(w . x). f_e is the fraction of the choices of all real tokens that fall on e and P_e their mean
    score, scores per token adding up to 1: the sum is 1 / E when both are uniform (Fedus et al. 2022, arXiv:2101.03961); the
    last term is from Zoph et al. 2022, arXiv:2202.08906.

    A call with a key moves b_e by bias_rate sign(1/E - f_e) after the choice: underloaded experts are chosen more often,
    and gradients are unaffected (Wang et al. 2024, arXiv:2408.15664). Sigmoids, this bias and groups are the router of
    DeepSeek-V3 (arXiv:2412.19437), except for its balance loss per sequence.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.activation = choose("activation", ACTIVATIONS, config.activation or "silu")
        d, multiple = config.latent or config.width, config.multiple_of
        hidden = config.hidden or -(-(8 * d) // (3 * multiple)) * multiple
        router = {"axes": ("embed", "expert"), "bias": config.bias}
        self.router = linear(config.width, config.experts, **router, rngs=rngs)
        inside = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.into = linear(config.width, d, axes=("embed", None), **inside) if config.latent else None
        self.out = linear(d, config.width, axes=(None, "embed"), **inside) if config.latent else None
        wide, back = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        self.gate = (
            parameter(rngs, _lecun_normal, (config.experts, d, hidden), axes=wide) if config.gated else None
        )
        self.up = parameter(rngs, _lecun_normal, (config.experts, d, hidden), axes=wide)
        self.down = parameter(rngs, _lecun_normal, (config.experts, hidden, d), axes=back)
        self.gate_bias = self._bias(hidden, "mlp", rngs) if config.gated else None
        self.up_bias = self._bias(hidden, "mlp", rngs)
        self.down_bias = self._bias(d, "embed", rngs)
        self.shared = self._shared(config.shared * hidden, rngs) if config.shared else None
        self.shared_gate = (
            linear(config.width, 1, axes=("embed", None), **inside) if config.shared_gate else None
        )
        self.bias = nnx.BatchStat(jnp.zeros(config.experts, jnp.float32)) if config.bias_rate else None
        self.auxiliary = AuxiliaryLoss(jnp.zeros((), jnp.float32))

    def _shared(self, hidden: int, rngs: nnx.Rngs) -> GLU | MLP:
        """Returns the experts that every token takes."""
        config = self.config
        own = MLPConfig(
            *(config.width, hidden, config.activation or "silu"), dropout=config.dropout, dtype=config.dtype
        )
        return (GLU if config.gated else MLP)(own, rngs=rngs)

    def _bias(self, size: int, axis: str, rngs: nnx.Rngs) -> nnx.Param | None:
        """Returns a bias per expert, if there are any."""
        if not self.config.bias:
            return None
        zeros, shape = nnx.initializers.zeros_init(), (self.config.experts, size)
        return parameter(rngs, zeros, shape, axes=("expert", axis), **NO_DECAY)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps each token; with a key also writes the auxiliary loss of the real tokens and moves the bias."""
        config = self.config
        keys = (None, None) if key is None else jax.random.split(key)
        x = select_masked(x, mask)
        tokens = x.reshape(-1, config.width)
        logits = jnp.matmul(
            tokens.astype(jnp.float32), self.router.matrix, precision=jax.lax.Precision.HIGHEST
        )
        if config.bias:
            logits = logits + self.router.bias[...][None]
        scores = SCORES[config.scores](logits)
        chosen = self._choose(scores)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.normalize:
            weights = _shares(weights)
        if key is not None:
            real = jnp.ones(len(tokens), bool) if mask is None else mask.reshape(-1)
            self._balance(logits, scores, chosen, real)
        run = {"dense": self._dense, "grouped": self._grouped, "picked": self._picked}[
            self._compute(len(tokens), training=key is not None)
        ]
        given = tokens.astype(config.dtype) if self.into is None else self.into(tokens)
        y = run(given, config.scale * weights, chosen, keys[0])
        y = (y if self.out is None else self.out(y)).reshape(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x, key=keys[1])
        if self.shared_gate is not None:
            shared = jax.nn.sigmoid(self.shared_gate(x)) * shared
        return y + shared

    def _compute(self, tokens: Any, *, training: bool) -> str:
        """Returns how the experts of so many tokens are run."""
        config = self.config
        if config.compute is not None:
            return config.compute
        few = known(tokens) and not training
        if few and 2 * tokens * config.top_k <= config.experts:
            return "picked"
        return "dense" if 2 * config.top_k >= config.experts or (few and tokens <= FEW) else "grouped"

    def _choose(self, scores: Float[Array, "n e"]) -> Int[Array, "n k"]:
        """Returns the experts per token: the best by score and bias within the best groups."""
        config = self.config
        merit = scores if self.bias is None else scores + self.bias[...][None]
        if config.top_groups < config.groups:
            grouped = merit.reshape(len(merit), config.groups, -1)
            best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[2]))
            _, groups = jax.lax.top_k(best.sum(-1), config.top_groups)
            open_ = jax.nn.one_hot(groups, config.groups, dtype=bool).any(1)
            merit = jnp.where(open_[..., None], grouped, -jnp.inf).reshape(merit.shape)
        return jax.lax.top_k(merit, config.top_k)[1]

    def _balance(
        self,
        logits: Float[Array, "n e"],
        scores: Float[Array, "n e"],
        chosen: Int[Array, "n k"],
        real: Bool[Array, "n"],
    ) -> None:
        """Writes the scaled losses of the router, averaged over real tokens, and moves the bias."""
        config = self.config
        weight = real.astype(jnp.float32)
        weight = weight / jnp.maximum(weight.sum(), 1)
        # Whole numbers, so that even loads compare as equal.
        counts = real.astype(jnp.float32) @ jax.nn.one_hot(chosen, config.experts, dtype=jnp.float32).sum(1)
        load = counts / jnp.maximum(counts.sum(), 1)
        shares = _shares(scores) if config.scores == "sigmoid" else scores
        balance = config.experts * jnp.sum(load * (weight @ shares))
        z = weight @ jnp.square(jax.nn.logsumexp(logits, axis=-1))
        self.auxiliary[...] = config.balance * balance + config.z_loss * z
        if self.bias is not None:
            self.bias[...] += config.bias_rate * jnp.sign(counts.sum() - config.experts * counts)

    def _matrices(self) -> tuple[Array | None, Array, Array]:
        return self._typed(self.gate, self.up, self.down)

    def _biases(self) -> tuple[Array | None, Array, Array] | None:
        return self._typed(self.gate_bias, self.up_bias, self.down_bias) if self.config.bias else None

    def _typed(self, *variables: nnx.Param | None) -> tuple[Array | None, ...]:
        return tuple(None if v is None else v[...].astype(self.config.dtype) for v in variables)

    def _hidden(self, gate: Array | None, up: Array) -> Array:
        """Returns the product of gates and inputs, or the activated inputs."""
        config = self.config
        if gate is None:
            return self.activation(up)
        if config.clamp is not None:
            gate, up = jnp.minimum(gate, config.clamp), jnp.clip(up, -config.clamp, config.clamp)
        gate = self.activation(gate) if config.gain == 1 else gate * jax.nn.sigmoid(config.gain * gate)
        return gate * (up + config.offset if config.offset else up)

    def _dense(self, x, weights, chosen, key):
        """Runs every expert on every token, with weight zero where it was not chosen."""
        gate, up, down = self._matrices()
        biases = self._biases()
        inner = [None if matrix is None else jnp.einsum("nd,edh->enh", x, matrix) for matrix in (gate, up)]
        if biases is not None:
            inner = [None if y is None else y + bias[:, None] for y, bias in zip(inner, biases, strict=False)]
        h = self._hidden(*inner)
        h = dropout(h, self.config.dropout, key)
        every = jnp.einsum(
            "nk,nke->en", weights, jax.nn.one_hot(chosen, self.config.experts, dtype=jnp.float32)
        )
        y = jnp.einsum("enh,ehd->end", h, down, preferred_element_type=jnp.float32)
        if biases is not None:
            y = y + biases[2][:, None]
        return jnp.einsum("end,en->nd", y, every).astype(x.dtype)

    def _picked(self, x, weights, chosen, key):
        """Multiplies every token by the matrices of its experts."""
        gate, up, down = (
            None if matrix is None else matrix.at[chosen].get(mode="promise_in_bounds")
            for matrix in self._matrices()
        )
        inner = [None if matrix is None else jnp.einsum("nd,nkdh->nkh", x, matrix) for matrix in (gate, up)]
        biases = self._biases()
        if biases is not None:
            biases = tuple(None if bias is None else bias[chosen] for bias in biases)
            inner = [None if y is None else y + bias for y, bias in zip(inner, biases, strict=False)]
        h = dropout(self._hidden(*inner), self.config.dropout, key)
        y = jnp.einsum("nkh,nkhd->nkd", h, down, preferred_element_type=jnp.float32)
        if biases is not None:
            y = y + biases[2]
        return jnp.einsum("nkd,nk->nd", y, weights).astype(x.dtype)

    def _grouped(self, x, weights, chosen, key):
        """Sorts tokens by expert into blocks of rows, each multiplied by the matrices of one expert.

        The rows of each expert are padded to whole blocks, so that shapes do not depend on their number.
        """
        n, d, k, experts = *x.shape, self.config.top_k, self.config.experts
        flat = chosen.reshape(-1)
        size = _block_size(n * k, experts)
        count = (n * k + experts * (size - 1)) // size
        rows = jnp.bincount(flat, length=experts)
        filled = -(-rows // size) * size
        rank = jnp.argsort(jnp.argsort(flat, stable=True))
        slot = rank + (jnp.cumsum(filled) - filled - jnp.cumsum(rows) + rows)[flat]
        blocks = jnp.zeros((count * size, d), x.dtype)
        blocks = blocks.at[slot].set(jnp.repeat(x, k, axis=0), unique_indices=True).reshape(count, size, d)
        owner = jnp.searchsorted(jnp.cumsum(filled), jnp.arange(count) * size, side="right")
        # A product picks the matrices, so that their gradient is a product too: summed in float32, in a fixed order.
        pick = jax.nn.one_hot(owner, experts, dtype=x.dtype)
        gate, up, down = (
            None if matrix is None else jnp.einsum("ne,eij->nij", pick, matrix) for matrix in self._matrices()
        )
        inner = [
            None if matrix is None else jnp.einsum("nbd,ndh->nbh", blocks, matrix) for matrix in (gate, up)
        ]
        biases = self._biases()
        if biases is not None:
            biases = tuple(None if bias is None else (pick @ bias)[:, None] for bias in biases)
            inner = [None if y is None else y + bias for y, bias in zip(inner, biases, strict=False)]
        h = self._hidden(*inner)
        h = dropout(h, self.config.dropout, key)
        y = jnp.einsum("nbh,nhd->nbd", h, down, preferred_element_type=jnp.float32)
        if biases is not None:
            y = y + biases[2]
        y = y.reshape(-1, d)
        y = y.at[slot].get(unique_indices=True).reshape(n, k, d)
        return jnp.einsum("nkd,nk->nd", y, weights).astype(x.dtype)


def _block_size(choices: int, experts: int) -> int:
    """Rows per block: about a quarter of the mean number per expert, a power of two from 8 to 512."""
    return min(512, max(8, 1 << (choices // (4 * experts)).bit_length()))


def _shares(scores: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Returns scores divided by their sum; zeros where all are zero, as sigmoids of logits below -104 are."""
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1)
