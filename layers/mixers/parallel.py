"""Parallel: several mixers read the same input and their outputs are added, as in Falcon-H1 (Zuo et al. 2025, arXiv:2507.22448)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers import mixers
from layers.mixer import SELF, Mixer, MixerState, Visit
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class ParallelConfig:
    """Options of `Parallel`.

    Attributes:
      width: d, number of input and output features.
      branches: options of the mixers by their names, two or more, all causal or none.
      scales: factors of the outputs by name; 1 for those left out.
      input_scales: factors of the input by name; 1 for those left out.
      layer, depth: index of the layer and number of layers of the model, passed to the mixers.
      dtype: dtype of the activations.
    """

    width: int
    branches: Mapping[str, Mapping[str, Any]]
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    input_scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if len(self.branches) < 2:
            raise ValueError(
                f"branches={dict(self.branches)}; expected the options of two mixers or more by name, such as "
                "{'mamba2': {}, 'attention': {'heads': 8}}"
            )
        for name in ("scales", "input_scales"):
            given = dict(getattr(self, name))
            if unknown := set(given) - set(self.branches):
                raise ValueError(
                    f"{name}={given} names {', '.join(sorted(unknown))}; branches has {', '.join(self.branches)}"
                )


class Parallel(Mixer):
    """Mixers side by side, such as the state space and the attention of Falcon-H1 (Zuo et al. 2025, arXiv:2507.22448).

        y = sum_i s_i F_i(r_i x)

    Each mixer has its own projections, and is a part of this one by its name. A state is that of every mixer.
    """

    patterns = SELF
    keeps_segments = True  # The mixers do what is to be done where a segment begins.

    def __init__(self, config: ParallelConfig, *, rngs: nnx.Rngs):
        self.config = config
        given = {name: getattr(config, name) for name in ("width", "layer", "depth", "dtype")}
        for name, options in config.branches.items():
            setattr(self, name, mixers.make_mixer(name, options, given=given, rngs=rngs))
        causal = {name: getattr(self, name).causal for name in config.branches}
        if len(set(causal.values())) > 1:
            future = ", ".join(name for name, alone in causal.items() if not alone)
            raise ValueError(f"branches has mixers that are not causal ({future}) beside causal ones")
        self.causal = all(causal.values())

    def initial(self, batch_size: int, max_length: int | None) -> dict[str, MixerState]:
        return {
            name: getattr(self, name).init_state(batch_size, max_length=max_length)
            for name in self.config.branches
        }

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: dict[str, MixerState] | None,
        segments: Segments | None,
        here: Visit | None,
    ) -> tuple[Float[Array, "b t d"], dict[str, MixerState | None]]:
        total, after = None, {}
        for name in self.config.branches:
            state = None if carried is None else carried[name]
            scale = self.config.input_scales.get(name, 1.0)
            u = x if scale == 1 else x * jnp.asarray(scale, x.dtype)
            y, after[name] = getattr(self, name)(u, state, segment_ids=segments)
            y = y * jnp.asarray(self.config.scales.get(name, 1.0), y.dtype)
            total = y if total is None else total + y
        return total, after
