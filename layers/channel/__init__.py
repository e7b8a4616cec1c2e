"""Channel mixers by name."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from layers.channel.glu import GEGLU, GLU, MLP, MLPConfig
from layers.channel.moe import MoE, MoEConfig
from layers.channel.product_key import ProductKeyConfig, ProductKeyMemory
from layers.channel.ssm_output import FullGLU, Gelu, HalfGLU1, HalfGLU2, OutputConfig
from layers.channel.ultra_memory import UltraMemory, UltraMemoryConfig
from layers.registry import build

CHANNEL_MIXERS = {
    "mlp": (MLPConfig, MLP),
    "swiglu": (MLPConfig, GLU),
    "geglu": (MLPConfig, GEGLU),
    "moe": (MoEConfig, MoE),
    "product_key": (ProductKeyConfig, ProductKeyMemory),
    "ultra_memory": (UltraMemoryConfig, UltraMemory),
    "gelu": (OutputConfig, Gelu),
    "half_glu1": (OutputConfig, HalfGLU1),
    "half_glu2": (OutputConfig, HalfGLU2),
    "full_glu": (OutputConfig, FullGLU),
}


def make_channel_mixer(
    name: str, options: Mapping[str, Any], *, given: Mapping[str, Any], rngs: nnx.Rngs
) -> nnx.Module:
    """Returns the channel mixer called `name`; see `CHANNEL_MIXERS`."""
    return build("channel mixer", CHANNEL_MIXERS, name, options, given=given, rngs=rngs)
