"""Mixers by name: the layers that move information along time. CONTRIBUTING.md states their contract."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from layers.mixers.attention.attention import Attention, AttentionConfig
from layers.mixers.attention.gated_attention import GatedAttention, GatedAttentionConfig
from layers.mixers.attention.linformer import Linformer, LinformerConfig
from layers.mixers.attention.mega import Mega, MegaConfig
from layers.mixers.attention.mla import MLA, MLAConfig
from layers.mixers.attention.selective_attention import SelectiveAttention, SelectiveAttentionConfig
from layers.mixers.bidirectional import Bidirectional, BidirectionalConfig
from layers.mixers.convolution.hyena import Hyena, HyenaConfig
from layers.mixers.convolution.lightweight_conv import DynamicConv, LightweightConv, LightweightConvConfig
from layers.mixers.convolution.sgconv import SGConv, SGConvConfig
from layers.mixers.delta_rule.deltanet import DeltaNet, DeltaNetConfig
from layers.mixers.delta_rule.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from layers.mixers.delta_rule.kda import KDA, KDAConfig
from layers.mixers.delta_rule.rwkv7 import RWKV7, RWKV7Config
from layers.mixers.linear_attention.gla import GLA, GLAConfig
from layers.mixers.linear_attention.lightning_attention import LightningAttention, LightningAttentionConfig
from layers.mixers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from layers.mixers.linear_attention.performer import Performer, PerformerConfig
from layers.mixers.linear_attention.retnet import RetNet, RetNetConfig
from layers.mixers.recurrence.hgrn import HGRN, HGRNConfig
from layers.mixers.recurrence.lru import LRU, LRUConfig
from layers.mixers.recurrence.lstm import LSTM, LSTMConfig
from layers.mixers.recurrence.rg_lru import RGLRU, RGLRUConfig
from layers.mixers.recurrence.rwkv4 import RWKV4, RWKV4Config
from layers.mixers.state_space.dss import DSS, DSSConfig
from layers.mixers.state_space.gss import GSS, GSSConfig
from layers.mixers.state_space.h3 import H3, H3Config
from layers.mixers.state_space.liquid_s4 import LiquidS4, LiquidS4Config
from layers.mixers.state_space.mamba import Mamba, MambaConfig
from layers.mixers.state_space.mamba2 import Mamba2, Mamba2Config
from layers.mixers.state_space.s4 import S4, S4Config
from layers.mixers.state_space.s4d import S4D, S4DConfig
from layers.mixers.state_space.s5 import S5, S5Config
from layers.mixers.token_mixing.fnet import FNet, FNetConfig
from layers.mixers.token_mixing.hypermixer import HyperMixer, HyperMixerConfig
from layers.mixers.token_mixing.wersa import WERSA, WERSAConfig
from layers.registry import build

MIXERS = {
    "attention": (AttentionConfig, Attention),
    "bidirectional": (BidirectionalConfig, Bidirectional),
    "deltanet": (DeltaNetConfig, DeltaNet),
    "dss": (DSSConfig, DSS),
    "dynamic_conv": (LightweightConvConfig, DynamicConv),
    "fnet": (FNetConfig, FNet),
    "gated_attention": (GatedAttentionConfig, GatedAttention),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNet),
    "gla": (GLAConfig, GLA),
    "gss": (GSSConfig, GSS),
    "h3": (H3Config, H3),
    "hgrn": (HGRNConfig, HGRN),
    "hyena": (HyenaConfig, Hyena),
    "hypermixer": (HyperMixerConfig, HyperMixer),
    "kda": (KDAConfig, KDA),
    "lightning_attention": (LightningAttentionConfig, LightningAttention),
    "lightweight_conv": (LightweightConvConfig, LightweightConv),
    "linear_attention": (LinearAttentionConfig, LinearAttention),
    "linformer": (LinformerConfig, Linformer),
    "liquid_s4": (LiquidS4Config, LiquidS4),
    "lru": (LRUConfig, LRU),
    "lstm": (LSTMConfig, LSTM),
    "mamba": (MambaConfig, Mamba),
    "mamba2": (Mamba2Config, Mamba2),
    "mega": (MegaConfig, Mega),
    "mla": (MLAConfig, MLA),
    "performer": (PerformerConfig, Performer),
    "retnet": (RetNetConfig, RetNet),
    "rg_lru": (RGLRUConfig, RGLRU),
    "rwkv4": (RWKV4Config, RWKV4),
    "rwkv7": (RWKV7Config, RWKV7),
    "s4": (S4Config, S4),
    "s4d": (S4DConfig, S4D),
    "s5": (S5Config, S5),
    "selective_attention": (SelectiveAttentionConfig, SelectiveAttention),
    "sgconv": (SGConvConfig, SGConv),
    "wersa": (WERSAConfig, WERSA),
}


def make_mixer(
    name: str, options: Mapping[str, Any], *, given: Mapping[str, Any], rngs: nnx.Rngs
) -> nnx.Module:
    """Returns the mixer called `name`; see `MIXERS`.

    Args:
      options: fields of the mixer's config.
      given: fields that the enclosing model supplies, such as width and dtype.

    Raises:
      ValueError: unknown name or option (with a suggestion), or an impossible combination of options.
    """
    return build("mixer", MIXERS, name, options, given=given, rngs=rngs)
