"""The config of blocks whose parameters several layers share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from layers.options import Count, checked_dataclass


@checked_dataclass(section="shared")
class SharedConfig:
    """Blocks whose parameters several layers share; see `seqmodels.shared`.

    Attributes:
      layers: numbers of the layers that use a block, in order.
      blocks: number of blocks, which these layers use in turn.
      mixer: options of the mixer, of twice the width of the model; a key "mixer" names it ("attention" if left out).
      channel: options of the channel mixer; a key "channel" names it ("swiglu" if left out).
      adapters: linear maps of the block, such as "mixer/query", to which each use adds a low-rank matrix of its own; those of
        a name like "channel/gate+channel/up" share its first factor.
      rank: rank of these matrices.
    """

    layers: tuple[Count, ...]
    blocks: int = 1
    mixer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    rank: int = 8

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"shared.layers={self.layers}; expected numbers of layers in increasing order")
        if self.blocks > len(self.layers):
            raise ValueError(
                f"shared.blocks={self.blocks} for {len(self.layers)} layers; expected at most one per layer"
            )

    def block_of(self, layer: int) -> int:
        """Returns the number of the block that a layer uses."""
        return self.layers.index(layer) % self.blocks
