"""What a search or a training looks at: all keys, values and queries of a row."""

from layers.caches.policy import CachePolicy
from layers.options import checked_dataclass


@checked_dataclass
class Watching(CachePolicy):
    """The whole cache, with the queries of all tokens.

    Attributes:
      length: number of tokens of a row.
    """

    length: int = 1

    @property
    def observed(self) -> int:
        return self.length
