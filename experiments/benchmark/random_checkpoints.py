"""Random checkpoints in the format of transformers, written tensor by tensor: the shapes of published models at other sizes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from seqmodels.config import parse
from seqmodels.interop import files
from seqmodels.interop.families import FAMILIES
from seqmodels.interop.loading import read_config, shapes_of
from seqmodels.interop.tensors import make_table

SHARD = 500_000_000

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
_QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "hidden_act": "silu",
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": False,
}
_MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "torch_dtype": "bfloat16",
    "conv_kernel": 4,
    "expand": 2,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "n_groups": 1,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": True,
    "use_bias": False,
    "use_conv_bias": True,
}


def _qwen3_next(
    width: int, layers: int, head: int, experts: int, hidden: int, vocabulary: int
) -> dict[str, Any]:
    return _QWEN3_NEXT | {
        "head_dim": head,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "linear_key_head_dim": head // 2,
        "linear_num_key_heads": width // head,
        "linear_num_value_heads": 2 * width // head,
        "linear_value_head_dim": head // 2,
        "moe_intermediate_size": hidden,
        "num_attention_heads": 2 * width // head,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": hidden,
        "vocab_size": vocabulary,
    }


def _llama(width: int, layers: int, hidden: int, head: int, vocabulary: int) -> dict[str, Any]:
    return _LLAMA | {
        "head_dim": head,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": width // head,
        "num_hidden_layers": layers,
        "num_key_value_heads": width // head // 4,
        "vocab_size": vocabulary,
    }


def _mamba2(width: int, layers: int, head: int, vocabulary: int) -> dict[str, Any]:
    return _MAMBA2 | {
        "head_dim": head,
        "hidden_size": width,
        "num_heads": 2 * width // head,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


# The options of config.json by architecture and size. At 1.5b, Llama has the layers of Llama 3.2 1B, and more of them, Mamba-2
# those of Mamba-2 2.7B, wider and fewer, and Qwen3-Next its 3:1 pattern with fewer experts.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "tiny": _llama(64, 2, 128, 16, 256),
        "1.5b": _llama(2048, 20, 8192, 64, 128256),
    },
    "qwen3_next": {
        "tiny": _qwen3_next(64, 4, 32, 4, 32, 256),
        "1.5b": _qwen3_next(1024, 16, 256, 40, 512, 151936),
    },
    "mamba2": {
        "tiny": _mamba2(64, 2, 16, 256),
        "1.5b": _mamba2(3072, 24, 64, 50288),
    },
}


def write(folder: Path, config: Mapping[str, Any], seed: int = 0) -> int:
    """Writes config.json and shards of bfloat16 tensors into an empty folder, and returns the number of parameters.

    Matrices (outputs, inputs) are uniform in +-1 / sqrt(inputs), and vectors between 1/2 and 1. Memory holds a shard.
    """
    family = FAMILIES[config["architectures"][0]]
    ours = read_config(family, dict(config), of="the config")
    shapes = make_table(family, parse(ours), shapes_of(ours)).shapes
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder, _drawn(shapes, np.random.default_rng(seed)), shard_size=SHARD)
    files.write_json(folder / files.CONFIG, config)
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _drawn(
    shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in sorted(shapes.items()):
        low, high = (0.5, 1.0) if len(shape) < 2 else (-(shape[-1] ** -0.5), shape[-1] ** -0.5)
        drawn = rng.random(shape, np.float32)
        drawn *= high - low
        drawn += low
        # The upper half of float32 is bfloat16, rounded towards zero.
        yield name, (drawn.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
