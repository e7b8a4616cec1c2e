"""Prepacking: prompts of different lengths are read side by side in full rows (Zhao et al. 2024, arXiv:2404.09529)."""

from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState
from layers.options import checked_dataclass
from layers.parts.cache import Cache


@checked_dataclass
class Prepacking(CachePolicy):
    """Prepacking: prompts of different lengths are read side by side in full rows (Zhao et al. 2024, arXiv:2404.09529).

    Rows are as long as the longest prompt, without the last token of any, and hold prompts as segments, the longest first, each in the
    first row with room for it. Then each prompt gets the keys and values of its own tokens. Exact: segments do not see each other. It
    saves what padding costs, and is for models all of whose layers hold keys and values of all tokens: the state of a recurrent layer is
    known at the end of a row alone.
    """

    compresses = False
    packs = True

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState | Cache:
        return cache
