"""Full: the cache of attention as it is, which loses nothing (Vaswani et al. 2017, arXiv:1706.03762)."""

from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState
from layers.options import checked_dataclass
from layers.parts.cache import Cache


@checked_dataclass
class Full(CachePolicy):
    """Full: keys and values of all tokens, what other policies are compared with (Vaswani et al. 2017, arXiv:1706.03762)."""

    compresses = False

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState | Cache:
        return cache
