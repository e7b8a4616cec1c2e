"""Cross scan: a mixer reads an image in several orders, whose outputs are added (VMamba; Liu et al. 2024, arXiv:2401.10166)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers import mixers
from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.parts.images import CROSS, check_orders, scans
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class CrossScanConfig:
    """Options of `CrossScan`.

    Attributes:
      width: d, number of input and output features.
      inner: name of a mixer. (The key "mixer" marks an alias in a model's config.)
      options: options of that mixer.
      columns: pixels in a row of the image.
      orders: scan orders: "row", "column", "snake", "hilbert" and "window", each also with "_reversed" behind its name.
      window: width of the windows of the order "window", in pixels.
      tied: whether all orders share one mixer; otherwise each has its own.
      layer, depth: index of the layer and number of layers of the model, passed to the mixer.
      dtype: dtype of the activations.
    """

    width: int
    inner: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    columns: int = 32
    orders: tuple[str, ...] = CROSS
    window: int = 4
    tied: bool = False
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        check_orders(self)


class CrossScan(Mixer):
    """A mixer in several scan orders of an image, as VMamba's cross scan (Liu et al. 2024, arXiv:2401.10166).

        y = sum_k P_k^-1 F_k(P_k x)

    with permutations P_k of the pixels and a mixer F_k for each, or one for all. The tokens of a segment are the pixels of an
    image in rows of `columns`, of which the last may be shorter: images of several heights share a batch, and a row may hold
    several. By default the orders are rows, columns, and both reversed. "window" is the scan of LocalMamba (Huang et al. 2024,
    arXiv:2403.09338), in squares. Not causal, and without a state. `vmamba` is the block in which the orders share
    projections, gate and convolution.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: CrossScanConfig, *, rngs: nnx.Rngs):
        self.config = config
        given = {name: getattr(config, name) for name in ("width", "layer", "depth", "dtype")}
        count = 1 if config.tied else len(config.orders)
        self.inner = nnx.List(
            mixers.make_mixer(config.inner, config.options, given=given, rngs=rngs) for _ in range(count)
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        config, total = self.config, 0
        found, ordered = scans(config.orders, x.shape[1], config.columns, segments, config.window)
        for number, scan in enumerate(found):
            mixer = self.inner[0 if config.tied else number]
            total += scan.restore(mixer(scan.read(x), segment_ids=ordered)[0])
        return total, None
