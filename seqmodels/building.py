"""Building whole models from plain mappings."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.parameters import group_of
from seqmodels import width_transfer
from seqmodels.autoencoder import Autoencoder
from seqmodels.classifier import Classifier
from seqmodels.config import (
    AutoencoderConfig,
    ClassifierConfig,
    DualEncoderConfig,
    EncoderDecoderConfig,
    HierarchicalMemoryConfig,
    LanguageModelConfig,
    MaskedLanguageModelConfig,
    PointerNetworkConfig,
    RecurrentMemoryConfig,
    RegressorConfig,
    ReplacedTokenDetectorConfig,
    parse,
)
from seqmodels.dual_encoder import DualEncoder
from seqmodels.encoder_decoder import EncoderDecoder
from seqmodels.hierarchical_memory import HierarchicalMemory
from seqmodels.language_model import LanguageModel
from seqmodels.masked_language_model import MaskedLanguageModel
from seqmodels.pointer_network import PointerNetwork
from seqmodels.recurrent_memory import RecurrentMemory
from seqmodels.regressor import Regressor
from seqmodels.replaced_token_detector import ReplacedTokenDetector

MODELS = {
    ClassifierConfig: Classifier,
    DualEncoderConfig: DualEncoder,
    EncoderDecoderConfig: EncoderDecoder,
    LanguageModelConfig: LanguageModel,
    MaskedLanguageModelConfig: MaskedLanguageModel,
    AutoencoderConfig: Autoencoder,
    RegressorConfig: Regressor,
    ReplacedTokenDetectorConfig: ReplacedTokenDetector,
    PointerNetworkConfig: PointerNetwork,
    RecurrentMemoryConfig: RecurrentMemory,
    HierarchicalMemoryConfig: HierarchicalMemory,
}


def build_model(
    config: Mapping[str, Any], *, rngs: nnx.Rngs
) -> (
    Classifier
    | DualEncoder
    | EncoderDecoder
    | LanguageModel
    | MaskedLanguageModel
    | Autoencoder
    | Regressor
    | PointerNetwork
    | ReplacedTokenDetector
):
    """Returns the model that a mapping describes.

    Args:
      config: "kind" (a key of `seqmodels.config.KINDS`, such as "classifier", "language_model" or "encoder_decoder") and, flat, the
        fields of `InputConfig`, `StackConfig` and of the config of that kind in `seqmodels.config`.
      rngs: source of the keys that initialize parameters.

    Raises:
      ValueError: an unknown field or name (with the nearest one), or inconsistent values.
    """
    parsed = parse(config)
    make = MODELS[type(parsed)]
    model = make(parsed, rngs=rngs)
    if (width := parsed.stack.base_width) is not None:
        if config["kind"] not in width_transfer.KINDS:
            raise ValueError(
                f"base_width={width} with kind={config['kind']!r}; muP is for {', '.join(width_transfer.KINDS)}"
            )
        narrow = parse({**width_transfer.at_width(config, width), "base_width": None})
        base = nnx.eval_shape(lambda: make(narrow, rngs=nnx.Rngs(0)))
        width_transfer.transfer(model, base, parsed.stack)
    dtype = jnp.dtype(parsed.stack.param_dtype)
    if dtype != jnp.float32:
        _store_matrices(model, dtype)
    return model


def _store_matrices(model: nnx.Module, dtype: jnp.dtype) -> None:
    """Sets the dtype of matrices of the optimizer group "default"; rates, norms and biases stay float32."""
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if parameter.ndim >= 2 and group_of(parameter) == "default":
            parameter.set_value(parameter[...].astype(dtype))
