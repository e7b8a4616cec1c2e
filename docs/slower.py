"""The tables of "Where others are faster", from the committed results of `python -m experiments.benchmark kernels`."""

import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
KERNELS = ROOT / "experiments" / "results" / "kernels_h100"
# Ratios within one percent are noise.
NOISE = 0.01


def comparisons(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns where something else is faster than what `impl=None` runs: another library, or an implementation of ours.

    Each has the case, both names, and "forward" and "both": how many times as long ours takes.
    """
    rows, found = results["rows"], []
    ours = {
        (row["primitive"], row["case"]): row
        for row in rows
        if row.get("default") or row["implementation"] == "default"
    }
    for row in rows:
        mine = ours.get((row["primitive"], row["case"]))
        if mine is None or row is mine or row.get("forward_ms") is None:
            continue
        forward, both = (mine[key] / row[key] for key in ("forward_ms", "both_ms"))
        if max(forward, both) > 1 + NOISE:
            name = row["implementation"]
            found.append(
                {
                    "primitive": row["primitive"],
                    "case": f"{row['case']}, {row['dtype']}",
                    "ours": mine["implementation"],
                    "theirs": f"{name} (ours)" if row["ours"] else name,
                    "times": {key: (mine[f"{key}_ms"], row[f"{key}_ms"]) for key in ("forward", "both")},
                    "forward": forward,
                    "both": both,
                }
            )
    return sorted(found, key=lambda one: -max(one["forward"], one["both"]))


def above_floor(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what `impl=None` runs of every case, farthest above the time of the fewest bytes and products first."""
    rows = [row for row in results["rows"] if row.get("default") or row["implementation"] == "default"]
    return sorted(rows, key=lambda row: -row["both_over_floor"])


def load(name: str) -> dict[str, Any]:
    """Returns the results of calls with kernels, "kernels.json", or of the others, "plain.json"."""
    results = json.loads((KERNELS / name).read_text(encoding="utf-8"))
    if name == "plain.json":
        # It also holds calls that kernels take; those of the other file count.
        taken = {(row["primitive"], row["case"]) for row in load("kernels.json")["rows"]}
        results["rows"] = [row for row in results["rows"] if (row["primitive"], row["case"]) not in taken]
    return results


def faster(name: str) -> str:
    """Returns the table of `comparisons`, with the command and the device."""
    results = load(name)
    columns = "what is faster", "forward, ms: ours, theirs", "both passes, ms: ours, theirs"
    rows = [
        (
            one["primitive"],
            one["case"],
            one["theirs"],
            *(_cell(one["times"][k], one[k]) for k in ("forward", "both")),
        )
        for one in comparisons(results)
    ]
    return _table(columns, rows, results)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], results: dict[str, Any]) -> str:
    """Returns a table whose rows begin with a primitive and a call, and where its figures come from."""
    columns = "primitive", "call", *columns
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| `{primitive}` | {' | '.join(cells)} |" for primitive, *cells in rows]
    return "\n".join(lines) + "\n\n" + source(results)


def _cell(times: tuple[float, float], ratio: float) -> str:
    shown = f"{times[0]:.3g}, {times[1]:.3g} ({ratio:.2f} times)"
    return f"**{shown}**" if ratio > 1 + NOISE else shown


def floors(name: str) -> str:
    """Returns the table of `above_floor`."""
    results = load(name)
    columns = "forward, ms", "times the floor", "both passes, ms", "times the floor"
    rows = [
        (
            row["primitive"],
            f"{row['case']}, {row['dtype']}",
            *(f"{row[f'{k}_ms']:.3g} | {row[f'{k}_over_floor']:.2g}" for k in ("forward", "both")),
        )
        for row in above_floor(results)
    ]
    return _table(columns, rows, results)


def source(results: dict[str, Any]) -> str:
    """Returns the command, device and versions of results, as a sentence."""
    versions = ", ".join(
        f"{name} {results['versions'][name]}"
        for name in ("jax", "jax-linear-attention", "flash-linear-attention", "torch")
        if name in results["versions"]
    )
    return f"`python -m {shlex.join(results['command'])}` on {results['device']}, medians of {results['rounds']} rounds; {versions}."
