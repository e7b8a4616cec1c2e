"""The config of the map from inputs to vectors."""

from typing import Literal

from layers.options import Count, NonNegative, Positive, checked_dataclass


@checked_dataclass
class InputConfig:
    """Config of the map from inputs to vectors.

    Attributes:
      vocab_size: number of tokens, if inputs are token ids (b, t).
      input_size: number of features, if inputs are vectors (b, t, input_size), mapped linearly. Exactly one of the two is
        set.
      hashes: number of hash functions of CANINE's embeddings of code points (`layers.reduction.HashEmbedding`) in place of a table with
        a row per token; None for the table.
      buckets: rows of the table of each hash function.
      embedding_stddev: standard deviation of initial embeddings; 1 / sqrt(width) if None.
      absolute_positions: encoding of the position in the segment that is added to inputs: "none", "learned" (a table) or
        "sinusoidal", where token embeddings are first multiplied by sqrt(width), as in the original Transformer.
      max_positions: number of rows of the learned table; tokens at later positions give NaN.
      first_position: row of the learned table for the first token of a segment; RoBERTa and Longformer have 2.
      token_types: number of vectors, one of which is added to each token by its type, such as 2 for pairs of sentences (BERT).
      embedding_scale: factor on token embeddings, before positions are added, such as sqrt(width) in Gemma; None for 1.
      embedding_norm: whether LayerNorm normalizes the embeddings of tokens, as in Bloom.
      embedding_norm_epsilon: epsilon of this norm.
      embedding_norm_place: "tokens", before positions and types are added, or "sum", after them (BERT).
      embedding_map: whether a linear map of the width follows, the last (FNet).
    """

    vocab_size: int | None = None
    input_size: int | None = None
    hashes: int | None = None
    buckets: int = 16384
    embedding_stddev: NonNegative | None = None
    absolute_positions: Literal["none", "learned", "sinusoidal"] = "none"
    max_positions: int | None = None
    first_position: Count = 0
    token_types: int | None = None
    embedding_scale: Positive | None = None
    embedding_norm: bool = False
    embedding_norm_epsilon: NonNegative = 1e-5
    embedding_norm_place: Literal["tokens", "sum"] = "tokens"
    embedding_map: bool = False

    def __post_init__(self) -> None:
        if (self.max_positions is None) == (self.absolute_positions == "learned"):
            raise ValueError(
                f"max_positions={self.max_positions} with absolute_positions={self.absolute_positions!r}; "
                "learned positions need the size of their table, others have none"
            )
        if (self.vocab_size is None) == (self.input_size is None):
            raise ValueError(
                f"vocab_size={self.vocab_size} and input_size={self.input_size}; "
                "set vocab_size for tokens or input_size for vectors, and not both"
            )
        if self.hashes is not None and (self.vocab_size is None or self.embedding_stddev is not None):
            raise ValueError(
                f"hashes={self.hashes} with vocab_size={self.vocab_size} and embedding_stddev={self.embedding_stddev}; hash embeddings "
                "are for tokens, and start with one deviation"
            )
        if self.embedding_norm_place == "sum" and not self.embedding_norm:
            raise ValueError(
                "embedding_norm_place='sum' has no effect without a norm; expected embedding_norm=True too"
            )
        if self.first_position and (self.max_positions or 0) <= self.first_position:
            raise ValueError(
                f"first_position={self.first_position} with max_positions={self.max_positions}; expected a row of the table of "
                "learned positions"
            )
        if self.vocab_size is None and (
            self.embedding_scale is not None
            or self.embedding_norm
            or self.embedding_map
            or self.token_types is not None
        ):
            raise ValueError(
                "embedding_scale, embedding_norm, embedding_map and token_types are for tokens; vectors (input_size) have none"
            )

    @property
    def longest(self) -> int | None:
        """The most tokens of a segment that have learned positions; None where these are not learned."""
        return None if self.max_positions is None else self.max_positions - self.first_position
