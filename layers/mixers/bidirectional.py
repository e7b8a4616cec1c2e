"""Bidirectional: any causal mixer run from both ends of the sequence (Schiff et al. 2024, arXiv:2403.03234)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from layers import mixers
from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.parameters import linear
from layers.parts.each_segment import reverse_segments
from layers.segments import Segments
from layers.typing import Array, Float

PROJECTIONS = ("input", "output")


@checked_dataclass
class BidirectionalConfig:
    """Options of `Bidirectional`.

    Attributes:
      width: d, number of input and output features.
      inner: name of a causal mixer. (The key "mixer" marks an alias in a model's config.)
      options: options of that mixer.
      combine: "sum" adds both directions; "concatenate" maps both to the width by one matrix.
      tied: weights that the directions share: False for none, "projections" for the projections into and out of the
        mixer, as in Mamba, or True for all.
      layer, depth: index of the layer and number of layers of the model, passed to the mixer.
      dtype: dtype of the activations.
    """

    width: int
    inner: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    combine: Literal["sum", "concatenate"] = "sum"
    tied: bool | Literal["projections"] = False
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32


class Bidirectional(Mixer):
    """Bidirectional: a causal mixer from both ends, as in BiMamba (Schiff et al. 2024, arXiv:2403.03234).

        y = F(x) + R(B(R(x)))        or        y = W [F(x), R(B(R(x)))]

    with mixers F and B of one kind, and R that reverses the tokens of every segment. Not causal; both mixers see the
    token itself. With tied="projections" and Mamba it is BiMamba-S (Wang et al. 2024, arXiv:2411.08909): as the output
    projection is linear, projecting the sum is the sum of the projections.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: BidirectionalConfig, *, rngs: nnx.Rngs):
        self.config = config
        given = {name: getattr(config, name) for name in ("width", "layer", "depth", "dtype")}

        def make() -> nnx.Module:
            return mixers.make_mixer(config.inner, config.options, given=given, rngs=rngs)

        self.forward = make()
        if not self.forward.causal:
            raise ValueError(
                f"inner={config.inner!r} is not causal with options={dict(config.options)}; it needs no second direction"
            )
        # With all weights tied, one mixer runs twice.
        self.backward = None if config.tied is True else make()
        if config.tied == "projections":
            for name in PROJECTIONS:
                if not hasattr(self.forward, name):
                    raise ValueError(
                        f"tied='projections' shares {' and '.join(PROJECTIONS)}, and inner={config.inner!r} has no {name}; "
                        "use tied=True or tied=False"
                    )
                setattr(self.backward, name, getattr(self.forward, name))
        joined = {"axes": (None, "embed"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.joined = (
            linear(2 * config.width, config.width, **joined) if config.combine == "concatenate" else None
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        backward = self.forward if self.backward is None else self.backward
        ahead, _ = self.forward(x, segment_ids=segments)
        back, _ = backward(reverse_segments(x, segments), segment_ids=segments)
        back = reverse_segments(back, segments)
        if self.joined is None:
            return ahead + back, None
        return self.joined(jnp.concatenate([ahead, back], axis=-1)), None
