"""What every mixer's primitives run as on a CPU, a GPU and a TPU, asked of the code without allocating anything."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels import devices, dispatch
from layers.kernels.suites import SUITES
from layers.mixers import MIXERS, make_mixer

ROOT = pathlib.Path(__file__).resolve().parents[1]
BACKENDS = ("cpu", "gpu", "tpu")
WIDTH, ROWS, LENGTH, DTYPE = 1024, 8, 4096, "bfloat16"
# What a mixer cannot do without, and lengths that the inputs here need.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bidirectional": {"inner": "mamba"},
    "cross_scan": {"inner": "mamba"},
    "dss": {"max_length": LENGTH},
    "hyena": {"max_length": LENGTH},
    "linformer": {"max_length": LENGTH},
    "parallel": {"branches": {"mamba2": {}, "attention": {}}},
    "sgconv": {"max_length": LENGTH},
    "tuned_state": {"inner": "gla"},
}


def facts(name: str, backends: Iterable[str] = BACKENDS) -> dict[str, Any]:
    """Returns what the code says of a mixer at `WIDTH` features, as JSON.

    Returns:
      "parameters", their number; "causal"; "state", the shapes of what one row carries, by name; and "calls", by backend a
      list of the primitive, the implementation it runs as, and the reasons against the others in order of preference.
    """
    mixer = nnx.eval_shape(
        lambda: make_mixer(
            name,
            OPTIONS.get(name, {}),
            given={"width": WIDTH, "dtype": jnp.dtype(DTYPE)},
            rngs=nnx.Rngs(0),
        )
    )
    graph, variables = nnx.split(mixer)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.dtype(DTYPE))
    calls = {}
    for backend in backends:
        with devices.as_on(backend), dispatch.explained() as choices:
            jax.eval_shape(lambda variables, x: nnx.merge(graph, variables)(x)[0], variables, x)
        calls[backend] = [
            [c.primitive, c.implementation, [list(one) for one in c.passed_over]] for c in choices
        ]
    state = {}
    if mixer.causal:
        carried = jax.eval_shape(
            lambda variables: nnx.merge(graph, variables).init_state(1, max_length=LENGTH), variables
        ).carried
        for path, leaf in jax.tree.leaves_with_path(carried):
            state[jax.tree_util.keystr(path, simple=True, separator=".")] = (
                f"{leaf.dtype}{list(leaf.shape[1:])}"
            )
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    return {"parameters": count, "causal": mixer.causal, "state": state, "calls": calls}


def table(names: Iterable[str] = MIXERS, *, stored: pathlib.Path | None = None) -> dict[str, dict[str, Any]]:
    """Returns `facts` by mixer; a file in the folder `stored` keeps them until a source of `layers` changes."""
    if stored is None:
        return {name: facts(name) for name in names}
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    for source in sorted((ROOT / "layers").rglob("*.py")):
        digest.update(source.relative_to(ROOT).as_posix().encode() + source.read_bytes())
    file = stored / f"support-{jax.__version__}-{digest.hexdigest()[:16]}.json"
    if not file.exists():
        found = table(names)
        stored.mkdir(parents=True, exist_ok=True)
        for old in stored.glob("support-*.json"):
            old.unlink()
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def documented(primitive: str) -> str:
    """Returns the primitive that the pages describe; `attention_with_lse` is `attention` with one more result."""
    return primitive.removesuffix("_with_lse")


def kernels(primitive: str, backend: str) -> tuple[str, ...]:
    """Returns the implementations of a primitive that are kernels written for one kind of device."""
    suite = SUITES[documented(primitive)]
    return {"cpu": (), "gpu": tuple(suite.gpu_implementations), "tpu": tuple(suite.tpu_implementations)}[
        backend
    ]


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the two tables of the page: what runs, and why no kernel of the device does."""
    runs = ["| mixer | CPU | GPU (Hopper) | TPU |", "|---|---|---|---|"]
    why = ["| mixer | device | primitive | runs as | why not a kernel |", "|---|---|---|---|---|"]
    for name, one in found.items():
        cells = []
        for backend in BACKENDS:
            calls = list(
                dict.fromkeys((p, i, tuple(map(tuple, reasons))) for p, i, reasons in one["calls"][backend])
            )
            cells.append("<br>".join(_run(backend, *call[:2]) for call in calls) or "plain JAX")
            if backend != "cpu":
                why.extend(f"| {link(name)} | {backend.upper()} | {row}" for row in _reasons(backend, calls))
        runs.append(f"| {link(name)} | {' | '.join(cells)} |")
    return "\n".join(runs) + "\n\n## Why no kernel is taken\n\n" + "\n".join(why) + "\n"


def link(name: str) -> str:
    """Returns a link to the section of a mixer, from a page at the top of the site."""
    return f"[`{name}`](mixers/{family(name)}.md#{name})"


def family(name: str) -> str:
    """Returns the family of a mixer: the folder of its module, or "wrappers" for what takes another mixer."""
    parts = MIXERS[name][1].__module__.split(".")
    return parts[2] if len(parts) > 3 else "wrappers"


def _run(backend: str, primitive: str, implementation: str) -> str:
    shown = f"**{implementation}**" if implementation in kernels(primitive, backend) else implementation
    return f"`{primitive}`: {shown}"


def _reasons(backend: str, calls: Iterable[tuple[str, str, tuple[tuple[str, str], ...]]]) -> Iterable[str]:
    for primitive, implementation, reasons in calls:
        names = kernels(primitive, backend)
        if implementation in names:
            continue
        against = "; ".join(f"{name}: {reason}" for name, reason in reasons if name in names)
        yield f"`{primitive}` | {implementation} | {against or 'the primitive has no kernel for this device'} |"
