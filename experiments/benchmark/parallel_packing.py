"""How many devices each document gets, by a cost model, and what that gains over cutting packed rows over all devices.

Cutting a short document over many devices sends much for little work. As in FlexSP (Wang et al. 2024, arXiv:2412.01523) and
ByteScale (Ge et al. 2025, arXiv:2502.21231), a long document gets many devices and a short one few. The seconds of a
document of n tokens on p devices are, with work and bytes of a layer of attention and its channel mixer,

    c(n, p) = work(n) / (p flops) + [p > 1] ((p - 1) latency + (p - 1) / p n bytes / bandwidth)

where nothing overlaps, and a step lasts as long as the busiest device. For a limit on the seconds of one document, each gets the fewest devices, a power of
two, that hold its tokens and keep the limit; from the most devices to the fewest and from long to short, each goes to the
aligned group of so many devices that is free first. Of many limits the one counts whose step is shortest. This is a
simulation: nothing runs on groups of different sizes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.benchmark.parallel import Links
from experiments.benchmark.parallel_methods import Sizes

BACKWARD = 3.0  # both passes for one of the forward
LIMITS = 32  # that are tried


class Placed(NamedTuple):
    """Where a document runs: its tokens, the first device, the number of devices, and the seconds that it takes."""

    tokens: int
    first: int
    devices: int
    seconds: float


class Model(NamedTuple):
    """The cost of documents.

    Attributes:
      sizes: of a layer; `time` is not read.
      links: rates.
      capacity: tokens that a device holds at once.
    """

    sizes: Sizes
    links: Links
    capacity: int

    def seconds(self, tokens: int, devices: int) -> float:
        """Returns the time of both passes of one document on each of so many devices."""
        return self.of_row([tokens], devices)

    def of_row(self, documents: Sequence[int], devices: int) -> float:
        """Returns the time of both passes of documents that are packed into one row over so many devices."""
        s, width = self.sizes, self.sizes.width
        work = sum(2 * tokens**2 * width + 24 * tokens * width**2 for tokens in documents)
        spent = BACKWARD * work / devices / self.links.flops
        if devices == 1:
            return spent
        sent = 2 * sum(documents) * s.kv_heads * s.head_dim * s.item * (devices - 1) / devices
        return spent + BACKWARD * ((devices - 1) * self.links.latency + sent / self.links.bandwidth)


def flexible(documents: Sequence[int], devices: int, model: Model) -> list[Placed]:
    """Returns a place for every document, long ones on many devices and short ones on few.

    Args:
      documents: tokens of each.
      devices: a power of two.

    Raises:
      ValueError: a document that all devices together cannot hold, or a number of devices that is no power of two.
    """
    _check(documents, devices, model)
    counts = [2**n for n in range(devices.bit_length())]
    fitting = [
        {count: model.seconds(tokens, count) for count in counts if tokens <= count * model.capacity}
        for tokens in documents
    ]
    if not fitting:
        return []
    least = max(min(seconds.values()) for seconds in fitting)
    most = max(max(seconds.values()) for seconds in fitting)
    tried = (_within(limit, documents, fitting, devices) for limit in np.geomspace(least, most, LIMITS))
    return min(tried, key=lambda placed: duration(placed, devices))


def _within(limit, documents, fitting, devices):
    """A place for every document, on as few devices as keep the limit, or else where it is shortest."""
    chosen = []
    for tokens, seconds in zip(documents, fitting, strict=True):
        keeping = [count for count, one in seconds.items() if one <= limit]
        count = min(keeping, default=min(seconds, key=seconds.get))
        chosen.append((count, seconds[count], tokens))
    free, placed = np.zeros(devices), []
    for count, seconds, tokens in sorted(chosen, reverse=True):
        first = count * int(free.reshape(-1, count).max(1).argmin())
        group = slice(first, first + count)
        free[group] = free[group].max() + seconds
        placed.append(Placed(tokens, first, count, seconds))
    return placed


def uniform(documents: Sequence[int], devices: int, model: Model) -> float:
    """Returns the seconds of a step in which all documents, packed into rows, are cut over all devices.

    Documents fill rows in the given order. Work is even, as in zig-zag order; documents and errors are those of `flexible`.
    """
    _check(documents, devices, model)
    rows: list[list[int]] = [[]]
    for tokens in documents:
        if sum(rows[-1]) + tokens > devices * model.capacity:
            rows.append([])
        rows[-1].append(tokens)
    return sum(model.of_row(row, devices) for row in rows)


def duration(placed: Sequence[Placed], devices: int) -> float:
    """Returns the seconds of a step: a group starts a document when all its devices are free."""
    free = np.zeros(devices)
    for one in placed:
        group = slice(one.first, one.first + one.devices)
        free[group] = free[group].max() + one.seconds
    return float(free.max())


def simulated(
    lengths: Sequence[int], devices: int, model: Model, *, batch: int, seed: int = 0
) -> dict[str, Any]:
    """Returns the durations of steps over these documents, shuffled and cut into batches, and their ratio.

    Args:
      lengths: tokens of each document; those that all devices cannot hold are cut into pieces of that size.
      batch: documents of a step; the last step may have fewer and is left out.
    """
    most = devices * model.capacity
    pieces = [piece for n in lengths for piece in [most] * (n // most) + [n % most] if piece]
    order = np.random.default_rng(seed).permutation(len(pieces))
    totals, used = np.zeros(3), np.zeros(devices.bit_length(), int)
    for start in range(0, len(pieces) - batch + 1, batch):
        documents = [pieces[i] for i in order[start : start + batch]]
        placed = flexible(documents, devices, model)
        alone = sum(model.seconds(n, 1) for n in documents) / devices
        together = uniform(documents, devices, model)
        # Where few documents are long, rows over all devices may be faster.
        totals += min(duration(placed, devices), together), together, alone
        used += np.bincount([one.devices.bit_length() - 1 for one in placed], minlength=len(used))
    return dict(
        documents=len(pieces),
        longest=max(pieces),
        median=float(np.median(pieces)),
        devices=devices,
        capacity=model.capacity,
        batch=batch,
        flexible_ms=1e3 * totals[0],
        uniform_ms=1e3 * totals[1],
        perfect_ms=1e3 * totals[2],
        gain=totals[1] / totals[0],
        documents_placed=int(used.sum()),
        documents_by_devices={str(2**n): int(count) for n, count in enumerate(used)},
    )


def line(found: dict[str, Any]) -> str:
    """Returns what `simulated` found as text."""
    return (
        f"{found['documents']} documents, the median of {found['median']:.0f} and the longest of {found['longest']} tokens, "
        f"{found['batch']} a step on {found['devices']} devices of {found['capacity']}: {found['gain']:.2f} times faster than rows over all; "
        f"work alone, evenly spread, would be {found['uniform_ms'] / found['perfect_ms']:.2f} times"
    )


def draw(rows: Sequence[Mapping[str, Any]], path: Path, links: Links) -> None:
    """Draws what `simulated` found for several numbers of devices: the gains, and how many documents got how many devices."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    gains, places = figure.subplots(1, 2)
    counts = [row["devices"] for row in rows]
    for ratio, label in (("gain", "by document"), (None, "work alone, evenly spread")):
        values = [row[ratio] if ratio else row["uniform_ms"] / row["perfect_ms"] for row in rows]
        gains.plot(counts, values, marker="o", label=label)
    gains.set(xscale="log", yscale="log", xlabel="devices", ylabel="times faster than rows over all devices")
    for row in rows:
        shares = {int(n): count / row["documents_placed"] for n, count in row["documents_by_devices"].items()}
        places.plot(
            *zip(*((n, share) for n, share in shares.items() if share)),
            marker="o",
            label=f"of {row['devices']}",
        )
    places.set(xscale="log", yscale="log", xlabel="devices of a document", ylabel="share of documents")
    for axes in (gains, places):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    first = rows[0]
    figure.suptitle(
        f"A simulation: documents of Python's standard library, a byte a token, as many a step as devices, which hold "
        f"{first['capacity']} tokens each;\n{links.describe()}",
        fontsize=8,
    )
    FigureCanvasAgg(figure).print_png(path)


def _check(documents, devices, model):
    if devices < 1 or devices & (devices - 1):
        raise ValueError(f"devices={devices}; expected a power of two")
    if documents and max(documents) > devices * model.capacity:
        raise ValueError(
            f"a document of {max(documents)} tokens; {devices} devices of capacity={model.capacity} hold {devices * model.capacity}"
        )
