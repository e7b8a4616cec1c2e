"""What the states of layers have in common: where rows stand, and which token each slot of a cache holds.

All layers read the same tokens, so that places agree, and so do the numbers, positions and lengths of caches of mixers with equal
options. A loop over tokens that carries one copy of them computes masks and angles of positions once per token, not once per layer.
"""

from collections.abc import Hashable, Iterator
from typing import Any

import jax

from layers.caches.state import CacheState
from layers.parts.cache import Cache
from layers.segments import Place
from seqmodels.config import StackConfig
from seqmodels.language_model import LanguageModelState

_FACTS = ("numbers", "positions", "length")


def lean(config: StackConfig, state: LanguageModelState) -> LanguageModelState:
    """Returns the state with None for what an earlier layer carries too; `whole` is the inverse."""
    seen: set[Hashable] = set()

    def once(key: Hashable, node: Any) -> Any:
        if key not in seen:
            seen.add(key)
            return node
        if isinstance(node, Place):
            return Place(None, None, None)
        return node._replace(**dict.fromkeys(_FACTS))

    return _mapped(config, state, once)


def whole(config: StackConfig, state: LanguageModelState) -> LanguageModelState:
    """Returns the state with what `lean` leaves out."""
    seen: dict[Hashable, Any] = {}

    def copied(key: Hashable, node: Any) -> Any:
        first = seen.setdefault(key, node)
        if isinstance(node, Place):
            return first
        return node._replace(**{name: getattr(first, name) for name in _FACTS})

    return _mapped(config, state, copied)


def _mapped(config: StackConfig, state: LanguageModelState, change: Any) -> LanguageModelState:
    """Returns the state with `change(key, node)` for places and caches; those of equal keys hold the same facts."""
    specs = _specs(config, len(state.layers))
    place = state.place if state.place is None else change(Place, state.place)
    layers = []
    for spec, layer in zip(specs, state.layers, strict=True):
        nodes, tree = jax.tree.flatten_with_path(layer, is_leaf=_is_node)
        nodes = [_changed(node, (spec, path), change) for path, node in nodes]
        layers.append(jax.tree.unflatten(tree, nodes))
    return state._replace(place=place, layers=tuple(layers))


def _is_node(node: Any) -> bool:
    # What a policy keeps depends on the layer.
    return isinstance(node, Place | Cache | CacheState)


def _changed(node: Any, where: Hashable, change: Any) -> Any:
    if isinstance(node, Place):
        return change(Place, node)
    if isinstance(node, Cache):
        return change((where, node.entries[0].shape[1]), node)
    return node


def _specs(config: StackConfig, count: int) -> Iterator[Hashable]:
    """Yields what decides which tokens the cache of a layer, or of a use of a shared block, holds."""
    for number in range(count):
        yield repr(config.mixer_of(number)) if number < config.depth else number
