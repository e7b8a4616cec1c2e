"""CANINE: hash embeddings of characters, and fewer molecules than characters (Clark et al. 2022, arXiv:2103.06874)."""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
from flax import nnx

from layers.channel.glu import ACTIVATIONS
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import ActivationDtype, Bound, NonNegative, checked_dataclass
from layers.parameters import linear, parameter
from layers.registry import choose
from layers.segments import SegmentIds, Segments, select_real
from layers.typing import Array, Bool, Float, Int

# Multipliers of the hash functions, in order.
PRIMES = (31, 43, 59, 61, 73, 97, 103, 113, 137, 149, 157, 173, 181, 193, 211, 223)


@checked_dataclass
class HashEmbeddingConfig:
    """Options of `HashEmbedding`.

    Attributes:
      width: d, number of features.
      hashes: number of hash functions, which divides the width; at most 16.
      buckets: number of rows of each table.
      dtype: dtype of the embeddings.
    """

    width: int
    hashes: int = 8
    buckets: int = 16384
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if not 1 <= self.hashes <= len(PRIMES) or self.width % self.hashes:
            raise ValueError(
                f"hashes={self.hashes} of width={self.width}; expected a divisor of the width, at most {len(PRIMES)}"
            )
        if self.buckets < 1:
            raise ValueError(f"buckets={self.buckets}; expected at least 1")


class HashEmbedding(nnx.Module):
    """Embeddings of any code points without a vocabulary: e(c) = [T_1[h_1(c)], ..., T_K[h_K(c)]],  h_k(c) = (c + 1) p_k mod buckets.

    T_k has d / K columns, and p_k are the primes 31, 43, 59, ... A code point is at least 0 and below 2^23, or its rows are others.
    """

    def __init__(self, config: HashEmbeddingConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.hashes, config.buckets, config.width // config.hashes)
        self.tables = parameter(rngs, nnx.initializers.normal(0.02), shape, axes=(None, "vocab", "embed"))

    def __call__(self, codes: Int[Array, "b t"], *, segment_ids: SegmentIds = None) -> Float[Array, "b t d"]:
        """Returns the embeddings of code points; zero at padding."""
        config, segments = self.config, Segments.of(segment_ids)
        primes = jnp.asarray(PRIMES[: config.hashes], jnp.int32)
        rows = (codes[..., None] + 1) * primes[None, None] % config.buckets
        x = self.tables[...][jnp.arange(config.hashes)[None, None], rows].astype(config.dtype)
        return select_real(x.reshape(*codes.shape, config.width), segments)


@checked_dataclass
class CharacterConfig:
    """Options of `Downsample` and `Upsample`.

    Attributes:
      width: d, number of features.
      rate: r, number of characters per molecule.
      kernel: number of taps of the convolution of `Upsample`.
      activation: activation of the convolutions.
      epsilon: epsilon of the norms.
      dtype: dtype of the activations.
    """

    width: int
    rate: Annotated[int, Bound(least=2)] = 4
    kernel: Annotated[int, Bound(least=1)] = 4
    activation: str = "gelu_erf"
    epsilon: NonNegative = 1e-12
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        choose("activation", ACTIVATIONS, self.activation)


class Molecules(NamedTuple):
    """Where the molecules of rows come from.

    Attributes:
      segments: segments of the molecules (b, n), which mixers over molecules take.
      places: the characters that each molecule is made of (b, n, r).
      first: whether a molecule is the first character of its segment.
      of_character: the molecule that stands for each character in `Upsample` (b, t).
    """

    segments: Segments
    places: Int[Array, "b n r"]
    first: Bool[Array, "b n"]
    of_character: Int[Array, "b t"]


class Downsample(nnx.Module):
    """One molecule for r characters, by a convolution of width and stride r; the first character of a segment is its first molecule.

        m_0 = norm(x_0),   m_i = norm(gelu(sum_j W_j x_{r (i - 1) + j} + b)),   i < max(1, floor(length / r)), j < r

    of each segment by itself: the last r characters or more have none of their own. As in the authors' code, but per segment.
    """

    def __init__(self, config: CharacterConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"axes": ("embed", None), "dtype": config.dtype, "rngs": rngs}
        self.convolution = linear(config.rate * config.width, config.width, **options)
        self.norm = _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], *, segment_ids: SegmentIds = None
    ) -> tuple[Float[Array, "b n d"], Molecules]:
        """Returns molecules, zero at padding, and where they come from.

        n is max(1, floor(t / r)) for rows of one segment, and floor(t / r) + N for at most N segments per row.

        Raises:
          ValueError: the most segments of a row are unknown.
        """
        segments = Segments.of(segment_ids)
        x = select_real(x, segments)
        found = molecules(x.shape[0], x.shape[1], self.config.rate, segments)
        rows = jnp.arange(x.shape[0])[:, None, None]
        taps = x[rows, found.places]
        y = self.convolution(taps.reshape(*taps.shape[:2], -1))
        y = jnp.where(found.first[..., None], taps[:, :, -1], ACTIVATIONS[self.config.activation](y))
        return select_real(self.norm(y), found.segments), found


class Upsample(nnx.Module):
    """One vector per character, made of the characters x_i and their molecules u_i.

        y_i = norm(gelu(sum_j W_j [x_{i + j - a}; u_{i + j - a}] + b)),   j < kernel,   a = floor((kernel - 1) / 2)

    of each segment by itself, with zeros beyond its ends; u_i = m_{min(floor(i / r) + 1, last)}.
    """

    def __init__(self, config: CharacterConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"axes": ("embed", None), "dtype": config.dtype, "rngs": rngs}
        self.convolution = linear(2 * config.kernel * config.width, config.width, **options)
        self.norm = _norm(config, rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        y: Float[Array, "b n d"],
        molecules: Molecules,
        *,
        segment_ids: SegmentIds = None,
    ) -> Float[Array, "b t d"]:
        """Returns one vector per character; zero at padding.

        Args:
          x: characters before `Downsample`.
          y: molecules, in the places of those of `Downsample`.
          molecules: what `Downsample` returns.
          segment_ids: those of the characters.
        """
        config, segments = self.config, Segments.of(segment_ids)
        rows = jnp.arange(x.shape[0])[:, None]
        both = jnp.concatenate([select_real(x, segments), y[rows, molecules.of_character]], axis=-1)
        at = _Compact(x.shape[0], x.shape[1], segments)
        before = (config.kernel - 1) // 2
        taps = [at.shifted(both, tap - before) for tap in range(config.kernel)]
        z = ACTIVATIONS[config.activation](self.convolution(jnp.concatenate(taps, axis=-1)))
        return select_real(self.norm(z), segments)


def molecules(b: int, t: int, rate: int, segments: Segments | None) -> Molecules:
    """Returns where the molecules of rows come from; see `Downsample`."""
    most = 1 if segments is None else segments.most
    if most is None:
        raise ValueError(
            "segment_ids may hold any number of segments per row, and that of molecules depends on it; expected "
            "Segments.of(segment_ids, packed=N), with the most of a row, or packed=False"
        )
    size = max(1, t // rate) if most == 1 else min(t, t // rate + most)
    at = _Compact(b, t, segments)
    length = jnp.zeros((b, t + 1), jnp.int32).at[at.rows, at.numbers].add(1)[at.rows, at.numbers]
    last = jnp.maximum(length // rate, 1) - 1
    # A molecule is known by the first character behind those that it is made of.
    marks = (at.numbers != 0) & (at.positions % rate == 0) & (at.positions // rate <= last)
    slot = jnp.cumsum(marks, axis=1, dtype=jnp.int32) - 1
    put = jnp.where(marks, slot, size)

    def collected(values):
        return jnp.zeros((b, size), jnp.int32).at[at.rows, put].set(values, mode="drop")

    first = collected((at.positions == 0).astype(jnp.int32)) == 1
    mark = collected(at.count)[..., None]
    # The first molecule of a segment is the character at its mark.
    count = jnp.where(first[..., None], mark, mark - jnp.arange(rate, 0, -1)[None, None])
    numbers = collected(at.numbers)
    packed = False if most == 1 else most
    start = (
        jnp.zeros((b, t + 1), jnp.int32).at[at.rows, at.numbers].max(jnp.where(at.positions == 0, slot, 0))
    )
    own = start[at.rows, at.numbers] + jnp.minimum(at.positions // rate + 1, last)
    return Molecules(
        Segments.of(numbers, padding="end", packed=packed),
        at.order[at.rows[..., None], jnp.clip(count, 0, t - 1)],
        first,
        jnp.where(at.numbers == 0, 0, own),
    )


class _Compact:
    """Rows of b x t tokens with their padding left out.

    Attributes:
      rows: (b, 1), to index with.
      numbers, positions: those of `Segments`.
      count: number of earlier real tokens of the row.
      order: place of the n-th real token of the row (b, t).
    """

    def __init__(self, b: int, t: int, segments: Segments | None):
        self.rows = jnp.arange(b)[:, None]
        every = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
        if segments is None:
            self.numbers, self.positions, self.count, self.order = jnp.ones_like(every), every, every, every
            return
        self.numbers, self.positions = segments.numbers, segments.positions
        real = self.numbers != 0
        self.count = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
        put = jnp.where(real, self.count, t)
        self.order = jnp.zeros((b, t), jnp.int32).at[self.rows, put].set(every, mode="drop")

    def shifted(self, x: Float[Array, "b t f"], by: int) -> Float[Array, "b t f"]:
        """Returns what stands `by` tokens later in the same segment; zero beyond its ends."""
        there = self.count + by
        place = self.order[self.rows, jnp.clip(there, 0, x.shape[1] - 1)]
        # Positions tell a token that is `by` later from one where the row ends.
        same = self.numbers[self.rows, place] == self.numbers
        same &= self.positions[self.rows, place] == self.positions + by
        return jnp.where((same & (self.numbers != 0))[..., None], x[self.rows, place], 0)


def _norm(config: CharacterConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(LayerNormConfig(config.width, config.epsilon, dtype=config.dtype), rngs=rngs)
