"""Policies of the caches of attention: which keys and values are kept, merged or rounded, and which are read.

`seqmodels.generate(..., cache="snapkv(budget=1024)")` uses one by name and options. Layers whose cache grows with the text are its
matter; recurrent layers, and those with a window, stay as they are.
"""

import ast
from typing import Any

from layers.caches.attention_gate import AttentionGate
from layers.caches.cake import Cake
from layers.caches.cskv import CSKV
from layers.caches.duoattention import DuoAttention
from layers.caches.full import Full
from layers.caches.gemfilter import GemFilter
from layers.caches.h2o import H2O
from layers.caches.headkv import HeadKV
from layers.caches.hip import HiP
from layers.caches.hydragen import Hydragen
from layers.caches.infllm import InfLLM
from layers.caches.keyformer import Keyformer
from layers.caches.kivi import KIVI
from layers.caches.kvmerger import KVMerger
from layers.caches.lean import Lean
from layers.caches.locret import Locret
from layers.caches.longheads import LongHeads
from layers.caches.lserve import LServe
from layers.caches.mikv import MiKV
from layers.caches.minference import MInference
from layers.caches.moa import MoA
from layers.caches.policy import CachePolicy
from layers.caches.prepacking import Prepacking
from layers.caches.pyramidkv import PyramidKV
from layers.caches.recycled import Recycled
from layers.caches.sale import SALE
from layers.caches.shadowkv import ShadowKV
from layers.caches.sirllm import SirLLM
from layers.caches.snapkv import SnapKV
from layers.caches.squeezed import Squeezed
from layers.caches.streaming import Streaming
from layers.caches.taskkv import TaskKV
from layers.caches.think import ThinK
from layers.caches.tokenselect import TokenSelect
from layers.caches.unlimiformer import Unlimiformer
from layers.caches.zipcache import ZipCache
from layers.registry import choose, make_config

CACHES: dict[str, type[CachePolicy]] = {
    "attention_gate": AttentionGate,
    "cake": Cake,
    "cskv": CSKV,
    "duoattention": DuoAttention,
    "full": Full,
    "gemfilter": GemFilter,
    "h2o": H2O,
    "headkv": HeadKV,
    "hip": HiP,
    "hydragen": Hydragen,
    "infllm": InfLLM,
    "keyformer": Keyformer,
    "kivi": KIVI,
    "kvmerger": KVMerger,
    "lean": Lean,
    "locret": Locret,
    "longheads": LongHeads,
    "lserve": LServe,
    "mikv": MiKV,
    "minference": MInference,
    "moa": MoA,
    "prepacking": Prepacking,
    "pyramidkv": PyramidKV,
    "recycled": Recycled,
    "sale": SALE,
    "shadowkv": ShadowKV,
    "sirllm": SirLLM,
    "snapkv": SnapKV,
    "squeezed": Squeezed,
    "streaming": Streaming,
    "taskkv": TaskKV,
    "think": ThinK,
    "tokenselect": TokenSelect,
    "unlimiformer": Unlimiformer,
    "zipcache": ZipCache,
}


def read_cache(cache: Any) -> CachePolicy:
    """Returns the policy that a text such as "snapkv" or "snapkv(budget=1024, pooling=max)" names.

    Raises:
      ValueError: the text is not of this form, there is no such policy or option, or a value is impossible.
      TypeError: neither a text nor a policy is given, or a value is of another kind.
    """
    if isinstance(cache, CachePolicy):
        return cache
    if not isinstance(cache, str):
        raise TypeError(f"cache is a {type(cache).__name__}; expected a text such as 'snapkv(budget=1024)'")
    name, options = _parsed(cache)
    return make_config(f"cache {name!r}", choose("cache", CACHES, name), options)


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options in NAME(KEY=VALUE, ...)."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            options = {keyword.arg: _value(keyword.value) for keyword in tree.keywords}
            if None not in options and len(options) == len(tree.keywords):
                return tree.func.id, options
        raise SyntaxError
    except (SyntaxError, ValueError):
        raise ValueError(
            f"cache={text!r}; expected a name with options, each once, such as snapkv(budget=1024, window=32)"
        ) from None


def _value(node: ast.expr) -> Any:
    """Returns a literal, or a bare name as a text."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


__all__ = ["CACHES", "CachePolicy", "read_cache"]
