"""The pages of the mixers, one per family: equation, paper, options, state, primitives and support of each."""

import dataclasses
import inspect
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from docs.support import DTYPE, LENGTH, WIDTH, documented, family, kernels
from layers.mixers import MIXERS

EQUATIONS = pathlib.Path(__file__).parent / "equations"
FAMILIES = {
    "state_space": "State space models",
    "recurrence": "Recurrences",
    "convolution": "Convolutions",
    "linear_attention": "Linear attention",
    "delta_rule": "Delta rules",
    "test_time": "Test-time training",
    "attention": "Softmax attention",
    "token_mixing": "Token mixing",
    "image": "Images",
    "wrappers": "Around a mixer",
}
PAPER = re.compile(r"\b(arXiv|doi):([\w./-]*\w)")
ADDRESS = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}


def of_family(name: str) -> list[str]:
    """Returns the names of the mixers of a family."""
    return [mixer for mixer in MIXERS if family(mixer) == name]


def summary(name: str) -> str:
    """Returns the first line of the module of a mixer, with its papers as links."""
    first = inspect.getmodule(MIXERS[name][1]).__doc__.strip().splitlines()[0]
    return with_links(first)


def with_links(text: str) -> str:
    """Returns text whose arXiv numbers and DOIs are links."""
    return PAPER.sub(lambda m: f"[{m[0]}]({ADDRESS[m[1]]}{m[2]})", text)


def paper(name: str) -> str:
    """Returns the address of the first paper that a mixer's module names.

    Raises:
      ValueError: it names none.
    """
    found = PAPER.search(inspect.getmodule(MIXERS[name][1]).__doc__)
    if found is None:
        raise ValueError(f"the docstring of the module of mixer {name!r} names no arXiv number and no DOI")
    return ADDRESS[found[1]] + found[2]


def described(config: type) -> dict[str, str]:
    """Returns what docstrings say of each field of a config, those of its bases included.

    Raises:
      ValueError: a field is described nowhere.
    """
    found: dict[str, str] = {}
    for one in reversed(config.__mro__):
        found |= _attributes(inspect.cleandoc(one.__doc__ or ""))
    fields = [field.name for field in dataclasses.fields(config)]
    missing = [name for name in fields if name not in found]
    if missing:
        raise ValueError(f"{config.__name__} does not say what {', '.join(missing)} means")
    return {name: found[name] for name in fields}


def _attributes(docstring: str) -> dict[str, str]:
    _, _, listed = docstring.partition("Attributes:\n")
    found = {}
    for entry in re.split(r"^  (?! )", listed, flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(": ")
        for name in names.split(", "):
            found[name.strip()] = " ".join(text.split())
    return found


def options(config: type) -> str:
    """Returns the table of options of a config."""
    rows = ["| option | default | |", "|---|---|---|"]
    texts = described(config)
    for field in dataclasses.fields(config):
        if field.name in ("width", "dtype"):
            continue
        rows.append(f"| `{field.name}` | {_default(field)} | {texts[field.name].replace('|', '&#124;')} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no options of its own."


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    return (
        f"`{value!r}`" if isinstance(value, int | float | str | tuple | None) else f"`{type(value).__name__}`"
    )


def section(name: str, facts: Mapping[str, Any]) -> str:
    """Returns the section of a mixer."""
    config, mixer = MIXERS[name]
    calls = facts["calls"]
    primitives = list(dict.fromkeys(documented(primitive) for primitive, _, _ in calls["cpu"]))
    used = ", ".join(f"[`{one}`](../concepts/primitives.md#{one})" for one in primitives)
    taken = {
        backend.upper(): list(
            dict.fromkeys(documented(p) for p, i, _ in calls[backend] if i in kernels(p, backend))
        )
        for backend in ("gpu", "tpu")
    }
    support = "; ".join(
        f"{device}: kernel of {', '.join(f'`{one}`' for one in found)}"
        for device, found in taken.items()
        if found
    )
    return "\n\n".join(
        [
            f"## `{name}` {{ #{name} }}",
            summary(name),
            (EQUATIONS / f"{name}.md").read_text(encoding="utf-8").strip(),
            f"**Primitives:** {used or 'none; it is written in JAX itself'}. "
            f"**Support:** every device in plain JAX{'; ' + support if support else ''} ([why](../support.md)). "
            f"**Class:** `{mixer.__module__}.{mixer.__name__}`, {facts['parameters']:,} parameters at width {WIDTH}.",
            _state(config, facts),
            options(config),
        ]
    )


def _state(config: type, facts: Mapping[str, Any]) -> str:
    if not facts["causal"]:
        by_option = any(field.name == "causal" for field in dataclasses.fields(config))
        return f"**State:** none{' unless `causal=True`' if by_option else ''}: it needs the whole sequence."
    leaves = ", ".join(
        f"`{name}: {shape}`" if name else f"`{shape}`" for name, shape in facts["state"].items()
    )
    return f"**State** of a row at width {WIDTH} in {DTYPE}, for up to {LENGTH} tokens: {leaves}."


def page(name: str, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page of a family."""
    package = inspect.getmodule(MIXERS[of_family(name)[0]][1]).__package__
    opening = "" if name == "wrappers" else inspect.cleandoc(__import__(package, fromlist=["*"]).__doc__)
    parts = [f"# {FAMILIES[name]}", opening, *(section(one, facts[one]) for one in of_family(name))]
    return "\n\n".join(part for part in parts if part) + "\n"


def overview(names: Iterable[str] = MIXERS) -> str:
    """Returns the table of all mixers, by family."""
    names = set(names)
    rows = ["| family | mixer | what it is |", "|---|---|---|"]
    for key, title in FAMILIES.items():
        rows += [
            f"| {title} | [`{name}`]({key}.md#{name}) | {summary(name)} |"
            for name in of_family(key)
            if name in names
        ]
    return "\n".join(rows)
