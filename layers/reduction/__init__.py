"""Layers that change the number of tokens, and keep what belongs to tokens with them: one paper a file."""

from layers.reduction.canine import (
    CharacterConfig,
    Downsample,
    HashEmbedding,
    HashEmbeddingConfig,
    Molecules,
    Upsample,
)
from layers.reduction.deletion_gate import DeletionGate, DeletionGateConfig, Remaining, remaining

__all__ = [
    "CharacterConfig",
    "DeletionGate",
    "DeletionGateConfig",
    "Downsample",
    "HashEmbedding",
    "HashEmbeddingConfig",
    "Molecules",
    "Remaining",
    "Upsample",
    "remaining",
]
