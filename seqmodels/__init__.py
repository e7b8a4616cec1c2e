"""Whole models: a stack of blocks between an embedding and a head, built from a plain mapping."""

from seqmodels import neighbours  # before anything of `layers` is imported

# isort: split
import importlib.metadata

from seqmodels.adapters import LoraConfig, adapt, merge_adapters
from seqmodels.autoencoder import Autoencoder
from seqmodels.building import build_model
from seqmodels.classifier import Classifier
from seqmodels.decimate import DecimateConfig, decimate
from seqmodels.dual_encoder import DualEncoder
from seqmodels.encoder_decoder import EncoderDecoder
from seqmodels.from_source import generate_from
from seqmodels.generation import Generation, generate, stream
from seqmodels.hierarchical_memory import HierarchicalMemory
from seqmodels.interop import load_adapter, load_pretrained, save_adapter, save_pretrained
from seqmodels.language_model import LanguageModel
from seqmodels.lazyllm import LazyLLMConfig, lazy_read, lazy_state
from seqmodels.lengthen import LengthenConfig, lengthen
from seqmodels.masked_language_model import MaskedLanguageModel
from seqmodels.pointer_network import PointerNetwork
from seqmodels.recurrent_memory import RecurrentMemory
from seqmodels.regressor import Regressor
from seqmodels.replaced_token_detector import ReplacedTokenDetector, ReplacedTokens

__all__ = [
    "Autoencoder",
    "Classifier",
    "DecimateConfig",
    "DualEncoder",
    "EncoderDecoder",
    "Generation",
    "HierarchicalMemory",
    "LanguageModel",
    "LazyLLMConfig",
    "LengthenConfig",
    "LoraConfig",
    "MaskedLanguageModel",
    "PointerNetwork",
    "RecurrentMemory",
    "Regressor",
    "ReplacedTokenDetector",
    "ReplacedTokens",
    "__version__",
    "adapt",
    "build_model",
    "decimate",
    "generate",
    "generate_from",
    "lazy_read",
    "lazy_state",
    "lengthen",
    "load_adapter",
    "load_pretrained",
    "merge_adapters",
    "save_adapter",
    "save_pretrained",
    "stream",
]

del neighbours
try:
    __version__ = importlib.metadata.version("jax-seqmodels")
except importlib.metadata.PackageNotFoundError:  # the sources are on the path and nothing is installed
    __version__ = "unknown"
