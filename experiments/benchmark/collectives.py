"""What a compiled program sends between devices, counted from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")


def bytes_sent(text: str) -> Counter:
    """Returns the bytes that a device sends, by kind of collective operation, as rings of devices carry them out.

    Of an array of n bytes over P devices a gather and a scatter of sums send (P - 1) / P n, an exchange of everything as
    much, a sum on all devices twice that, and a permutation all of it, if it moves anything. Loops count as often as they run,
    and of branches the one that sends most.

    Args:
      text: of a compiled program, `compiled.as_text()`.

    Raises:
      ValueError: a loop that sends has no known number of steps.
    """
    computations, entry = _computations(text)
    known: dict[str, Counter] = {}

    def of(name: str) -> Counter:
        if name not in known:
            total: Counter = Counter()
            for line in computations[name]:
                total.update(_own(line))
                for called, times in _calls(line):
                    inner = of(called)
                    if inner and times is None:
                        raise ValueError(f"the loop {called} sends, and its number of steps is not known")
                    total.update({kind: size * (times or 0) for kind, size in inner.items()})
                branches = [of(branch) for branch in _branches(line)]
                total.update(max(branches, key=Counter.total, default=Counter()))
            known[name] = total
        return known[name]

    return of(entry)


def total_sent(text: str) -> int | None:
    """Returns the bytes of all kinds that a device sends; None where a loop that sends has no known number of steps."""
    try:
        return bytes_sent(text).total()
    except ValueError:
        return None


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
    """The lines of every computation, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return found, entry


def _calls(line: str) -> Iterator[tuple[str, int | None]]:
    """The computations that an instruction runs, and how often; None if that is not known."""
    loop = " while(" in line
    for name in _CALLED.findall(line):
        trips = _TRIPS.search(line)
        yield name, (int(trips[1]) if trips else None) if loop else 1


def _branches(line: str) -> list[str]:
    if " conditional(" not in line:
        return []
    names = [name for pair in _BRANCHES.findall(line) for name in pair if name]
    return [name.strip().lstrip("%") for group in names for name in group.split(",")]


def _own(line: str) -> dict[str, int]:
    """What an instruction itself sends."""
    match = _COLLECTIVE.search(line)
    if match is None:
        return {}
    shapes, kind, start = match.groups()
    if start and kind in ("all-gather", "collective-permute"):
        shapes = _second(shapes)  # of what goes in and what comes out
    size, parts = _size(shapes), _parts(line)
    sent = {
        "all-gather": size * (parts - 1) // parts,
        "reduce-scatter": size * (parts - 1),
        "all-reduce": 2 * size * (parts - 1) // parts,
        "all-to-all": size * (parts - 1) // parts,
        "collective-permute": size if _moves(line) else 0,
    }[kind]
    return {kind: sent} if sent else {}


def _size(shapes: str) -> int:
    """Bytes of all arrays in the text of a type."""
    total = 0
    for dtype, sizes in re.findall(r"([a-z]+\d*)\w*\[([\d,]*)\]", shapes):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return total


def _second(shapes: str) -> str:
    """The second of the types in the text of a tuple."""
    depth, parts = 0, [""]
    for letter in shapes[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[1]


def _parts(line: str) -> int:
    """The number of devices that take part in one group of an operation."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 1


def _moves(line: str) -> bool:
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return bool(pairs) and any(i != j for i, j in re.findall(r"\{(\d+),(\d+)", pairs[1]))
