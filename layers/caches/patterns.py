"""Patterns along which a head reads a prompt."""

from typing import Any

from layers.caches.by_head import read_json
from layers.options import check_integer

# A pattern is its name and two numbers.
PATTERNS = {
    "a_shape": ("first tokens", "last tokens"),
    "vertical_slash": ("columns", "diagonals"),
    "block_sparse": ("blocks", "nothing, 0"),
}
Pattern = tuple[str, int, int]


def read_patterns(option: str, given: Any) -> tuple[tuple[Pattern, ...], ...]:
    """Returns patterns per layer and query head, from nested sequences or a JSON file of them.

    Raises:
      ValueError, TypeError: there is no such file, or it holds something else.
    """
    given = read_json(option, given)
    try:
        found = tuple(tuple((name, m, n) for name, m, n in layer) for layer in given)
    except (TypeError, ValueError):
        raise TypeError(
            f"{option}={given!r}; expected a list per layer of one pattern [name, m, n] per query head, or a JSON file of them"
        ) from None
    for layer, patterns in enumerate(found):
        for head, (name, m, n) in enumerate(patterns):
            if name not in PATTERNS:
                raise ValueError(
                    f"{option}[{layer}][{head}] has the pattern {name!r}; expected one of {', '.join(PATTERNS)}"
                )
            for number in (m, n):
                check_integer(f"{option}[{layer}][{head}] of {name}", number, least=0)
    return found
