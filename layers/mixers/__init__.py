"""Mixers by name: the layers that move information along time. CONTRIBUTING.md states their contract."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from layers.mixers.attention.attention import Attention
from layers.mixers.attention.bigbird import BigBird, BigBirdConfig
from layers.mixers.attention.core_context import CoreContext, CoreContextConfig
from layers.mixers.attention.differential_attention import DifferentialAttention, DifferentialAttentionConfig
from layers.mixers.attention.dsa import DSA, DSAConfig
from layers.mixers.attention.etc import ETC, ETCConfig
from layers.mixers.attention.forgetting_attention import ForgettingAttention, ForgettingAttentionConfig
from layers.mixers.attention.gated_attention import GatedAttention, GatedAttentionConfig
from layers.mixers.attention.informer import Informer, InformerConfig
from layers.mixers.attention.landmark import Landmark, LandmarkConfig
from layers.mixers.attention.linformer import Linformer, LinformerConfig
from layers.mixers.attention.longformer import Longformer, LongformerConfig
from layers.mixers.attention.longt5 import LongT5, LongT5Config
from layers.mixers.attention.luna import Luna, LunaConfig
from layers.mixers.attention.mega import Mega, MegaConfig
from layers.mixers.attention.mla import MLA, MLAConfig
from layers.mixers.attention.moba import MoBA, MoBAConfig
from layers.mixers.attention.nsa import NSA, NSAConfig
from layers.mixers.attention.nystromformer import Nystromformer, NystromformerConfig
from layers.mixers.attention.path_attention import PaTHAttention, PaTHAttentionConfig
from layers.mixers.attention.power_attention import PowerAttention
from layers.mixers.attention.reformer import Reformer, ReformerConfig
from layers.mixers.attention.selective_attention import SelectiveAttention, SelectiveAttentionConfig
from layers.mixers.attention.shifted_sparse import ShiftedSparse, ShiftedSparseConfig
from layers.mixers.attention.shortformer import Shortformer, ShortformerConfig
from layers.mixers.attention.softplus_attention import SoftplusAttention, SoftplusAttentionConfig
from layers.mixers.attention.sparse_mla import SparseMLA, SparseMLAConfig
from layers.mixers.attention.static_blocks import StaticBlocksConfig
from layers.mixers.attention.strided_attention import StridedAttention, StridedAttentionConfig
from layers.mixers.attention.transformer_xl import TransformerXL, TransformerXLConfig
from layers.mixers.bidirectional import Bidirectional, BidirectionalConfig
from layers.mixers.convolution.gated_short_conv import GatedShortConv, GatedShortConvConfig
from layers.mixers.convolution.hyena import Hyena, HyenaConfig
from layers.mixers.convolution.lightweight_conv import DynamicConv, LightweightConv, LightweightConvConfig
from layers.mixers.convolution.sgconv import SGConv, SGConvConfig
from layers.mixers.cross_scan import CrossScan, CrossScanConfig
from layers.mixers.delta_rule.comba import Comba, CombaConfig
from layers.mixers.delta_rule.deltanet import DeltaNet, DeltaNetConfig
from layers.mixers.delta_rule.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from layers.mixers.delta_rule.gated_deltanet2 import GatedDeltaNet2, GatedDeltaNet2Config
from layers.mixers.delta_rule.gated_deltaproduct import GatedDeltaProduct, GatedDeltaProductConfig
from layers.mixers.delta_rule.kda import KDA, KDAConfig
from layers.mixers.delta_rule.rwkv7 import RWKV7, RWKV7Config
from layers.mixers.delta_rule.sse_gdn import SSEGatedDeltaNet, SSEGatedDeltaNetConfig
from layers.mixers.image.msvmamba import MSVMamba, MSVMambaConfig
from layers.mixers.image.s4nd import S4ND, S4NDConfig
from layers.mixers.image.vmamba import VMamba, VMambaConfig
from layers.mixers.linear_attention.based import Based, BasedConfig
from layers.mixers.linear_attention.gla import GLA, GLAConfig
from layers.mixers.linear_attention.hgrn2 import HGRN2, HGRN2Config
from layers.mixers.linear_attention.lightning_attention import LightningAttention, LightningAttentionConfig
from layers.mixers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from layers.mixers.linear_attention.mlstm import MLSTM, MLSTMConfig
from layers.mixers.linear_attention.performer import Performer, PerformerConfig
from layers.mixers.linear_attention.retnet import RetNet, RetNetConfig
from layers.mixers.linear_attention.rwkv6 import RWKV6, RWKV6Config
from layers.mixers.linear_attention.sse import SSE, SSEConfig
from layers.mixers.linear_attention.xlstm7b import XLSTM7B, XLSTM7BConfig
from layers.mixers.parallel import Parallel, ParallelConfig
from layers.mixers.recurrence.hgrn import HGRN, HGRNConfig
from layers.mixers.recurrence.lru import LRU, LRUConfig
from layers.mixers.recurrence.lstm import LSTM, LSTMConfig
from layers.mixers.recurrence.rg_lru import RGLRU, RGLRUConfig
from layers.mixers.recurrence.rwkv4 import RWKV4, RWKV4Config
from layers.mixers.recurrence.rwkv_channel import RWKVChannel, RWKVChannelConfig
from layers.mixers.recurrence.slstm import SLSTM, SLSTMConfig
from layers.mixers.state_space.b2s6 import B2S6, B2S6Config
from layers.mixers.state_space.dss import DSS, DSSConfig
from layers.mixers.state_space.gss import GSS, GSSConfig
from layers.mixers.state_space.h3 import H3, H3Config
from layers.mixers.state_space.linoss import LinOSS, LinOSSConfig
from layers.mixers.state_space.liquid_s4 import LiquidS4, LiquidS4Config
from layers.mixers.state_space.log_linear_mamba2 import LogLinearMamba2, LogLinearMamba2Config
from layers.mixers.state_space.mamba import Mamba, MambaConfig
from layers.mixers.state_space.mamba2 import Mamba2, Mamba2Config
from layers.mixers.state_space.mamba3 import Mamba3, Mamba3Config
from layers.mixers.state_space.s4 import S4, S4Config
from layers.mixers.state_space.s4d import S4D, S4DConfig
from layers.mixers.state_space.s5 import S5, S5Config
from layers.mixers.test_time.atlas import Atlas, AtlasConfig
from layers.mixers.test_time.mesa_net import MesaNet, MesaNetConfig
from layers.mixers.test_time.titans import Titans, TitansConfig
from layers.mixers.test_time.ttt_linear import TTTLinear, TTTLinearConfig
from layers.mixers.token_mixing.fnet import FNet, FNetConfig
from layers.mixers.token_mixing.hypermixer import HyperMixer, HyperMixerConfig
from layers.mixers.token_mixing.wersa import WERSA, WERSAConfig
from layers.mixers.tuned_state import TunedState, TunedStateConfig
from layers.parts.attention_config import AttentionConfig
from layers.registry import build

MIXERS = {
    "atlas": (AtlasConfig, Atlas),
    "attention": (AttentionConfig, Attention),
    "b2s6": (B2S6Config, B2S6),
    "based": (BasedConfig, Based),
    "bidirectional": (BidirectionalConfig, Bidirectional),
    "bigbird": (BigBirdConfig, BigBird),
    "comba": (CombaConfig, Comba),
    "core_context": (CoreContextConfig, CoreContext),
    "cross_scan": (CrossScanConfig, CrossScan),
    "deltanet": (DeltaNetConfig, DeltaNet),
    "differential_attention": (DifferentialAttentionConfig, DifferentialAttention),
    "dsa": (DSAConfig, DSA),
    "dss": (DSSConfig, DSS),
    "dynamic_conv": (LightweightConvConfig, DynamicConv),
    "etc": (ETCConfig, ETC),
    "fnet": (FNetConfig, FNet),
    "forgetting_attention": (ForgettingAttentionConfig, ForgettingAttention),
    "gated_attention": (GatedAttentionConfig, GatedAttention),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNet),
    "gated_deltanet2": (GatedDeltaNet2Config, GatedDeltaNet2),
    "gated_deltaproduct": (GatedDeltaProductConfig, GatedDeltaProduct),
    "gated_short_conv": (GatedShortConvConfig, GatedShortConv),
    "gla": (GLAConfig, GLA),
    "gss": (GSSConfig, GSS),
    "h3": (H3Config, H3),
    "hgrn": (HGRNConfig, HGRN),
    "hgrn2": (HGRN2Config, HGRN2),
    "hyena": (HyenaConfig, Hyena),
    "hypermixer": (HyperMixerConfig, HyperMixer),
    "informer": (InformerConfig, Informer),
    "kda": (KDAConfig, KDA),
    "landmark": (LandmarkConfig, Landmark),
    "lightning_attention": (LightningAttentionConfig, LightningAttention),
    "lightweight_conv": (LightweightConvConfig, LightweightConv),
    "linear_attention": (LinearAttentionConfig, LinearAttention),
    "linformer": (LinformerConfig, Linformer),
    "linoss": (LinOSSConfig, LinOSS),
    "liquid_s4": (LiquidS4Config, LiquidS4),
    "log_linear_mamba2": (LogLinearMamba2Config, LogLinearMamba2),
    "longformer": (LongformerConfig, Longformer),
    "longt5": (LongT5Config, LongT5),
    "lru": (LRUConfig, LRU),
    "lstm": (LSTMConfig, LSTM),
    "luna": (LunaConfig, Luna),
    "mamba": (MambaConfig, Mamba),
    "mamba2": (Mamba2Config, Mamba2),
    "mamba3": (Mamba3Config, Mamba3),
    "mega": (MegaConfig, Mega),
    "mesa_net": (MesaNetConfig, MesaNet),
    "mla": (MLAConfig, MLA),
    "mlstm": (MLSTMConfig, MLSTM),
    "moba": (MoBAConfig, MoBA),
    "msvmamba": (MSVMambaConfig, MSVMamba),
    "nsa": (NSAConfig, NSA),
    "nystromformer": (NystromformerConfig, Nystromformer),
    "parallel": (ParallelConfig, Parallel),
    "path_attention": (PaTHAttentionConfig, PaTHAttention),
    "performer": (PerformerConfig, Performer),
    "power_attention": (StaticBlocksConfig, PowerAttention),
    "reformer": (ReformerConfig, Reformer),
    "retnet": (RetNetConfig, RetNet),
    "rg_lru": (RGLRUConfig, RGLRU),
    "rwkv4": (RWKV4Config, RWKV4),
    "rwkv6": (RWKV6Config, RWKV6),
    "rwkv7": (RWKV7Config, RWKV7),
    "rwkv_channel": (RWKVChannelConfig, RWKVChannel),
    "s4": (S4Config, S4),
    "s4d": (S4DConfig, S4D),
    "s4nd": (S4NDConfig, S4ND),
    "s5": (S5Config, S5),
    "selective_attention": (SelectiveAttentionConfig, SelectiveAttention),
    "sgconv": (SGConvConfig, SGConv),
    "shifted_sparse": (ShiftedSparseConfig, ShiftedSparse),
    "shortformer": (ShortformerConfig, Shortformer),
    "slstm": (SLSTMConfig, SLSTM),
    "softplus_attention": (SoftplusAttentionConfig, SoftplusAttention),
    "sparse_mla": (SparseMLAConfig, SparseMLA),
    "strided_attention": (StridedAttentionConfig, StridedAttention),
    "sse": (SSEConfig, SSE),
    "sse_gdn": (SSEGatedDeltaNetConfig, SSEGatedDeltaNet),
    "titans": (TitansConfig, Titans),
    "transformer_xl": (TransformerXLConfig, TransformerXL),
    "ttt_linear": (TTTLinearConfig, TTTLinear),
    "tuned_state": (TunedStateConfig, TunedState),
    "vmamba": (VMambaConfig, VMamba),
    "wersa": (WERSAConfig, WERSA),
    "xlstm7b": (XLSTM7BConfig, XLSTM7B),
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
