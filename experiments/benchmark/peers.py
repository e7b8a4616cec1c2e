"""Baselines: the same computations by other libraries and by plain JAX.

`peers(primitive, name)` returns functions of the arrays of a benchmark by displayed name. A library that cannot be
imported is left out.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.calls import Function, JaxFunction
from experiments.benchmark.torch_functions import TorchFunction

PACKAGES = ("jax-linear-attention", "flash-linear-attention", "torch", "triton")


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that can be imported."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peers(primitive: str, case: str) -> dict[str, JaxFunction | TorchFunction]:
    """Returns all other functions that compute the case called `case` of a primitive."""
    found: dict[str, JaxFunction | TorchFunction] = {
        name: JaxFunction(function) for name, function in PLAIN.get((primitive, case), {}).items()
    }
    if importlib.util.find_spec("jla") is not None:
        found |= {
            name: JaxFunction(function) for name, function in _jax_linear_attention(primitive, case).items()
        }
    if importlib.util.find_spec("torch") is not None and (primitive, case) == ("attention", "causal"):
        found["PyTorch, scaled_dot_product_attention"] = TorchFunction(lambda: _torch_attention)
    if importlib.util.find_spec("fla") is not None and jax.default_backend() == "gpu":
        kernel = _FLASH_LINEAR_ATTENTION.get((primitive, case))
        if kernel is not None:
            found["flash-linear-attention"] = TorchFunction(functools.partial(_fla_kernel, *kernel))
    return found


def _associative_scan(a: Any, x: Any) -> Any:
    """Returns the recurrence as an associative scan, as JAX users commonly write it."""

    def step(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(step, (jnp.broadcast_to(a, x.shape), x), axis=1)[1]


def _dense_attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


PLAIN = {
    ("linear_recurrence", "real"): {"lax.associative_scan": _associative_scan},
    ("linear_recurrence", "real in bfloat16"): {"lax.associative_scan": _associative_scan},
    ("linear_recurrence", "complex with fixed factors"): {"lax.associative_scan": _associative_scan},
    ("attention", "causal"): {"jax.nn, dense": _dense_attention},
}


# Names of our cases in jax-linear-attention.
_JAX_LINEAR_ATTENTION = {
    ("gated_linear_attention", "scalar decay"): "simple_gla",
    ("gated_linear_attention", "scalar decay on one row"): "simple_gla",
    ("gated_linear_attention", "channel decay"): "gla",
    ("gated_linear_attention", "Mamba-2"): "simple_gla",
    ("delta_rule", "delta rule"): "deltanet",
    ("delta_rule", "gated delta rule"): "gated_deltanet",
    ("delta_rule", "gated delta rule on one row"): "gated_deltanet",
    ("delta_rule", "KDA"): "kda",
}


def _jax_linear_attention(primitive: str, case: str) -> dict[str, Function]:
    """Returns the plain-JAX ("chunked") forms, whose products are all in float32, and the Hopper kernels."""
    kind = _JAX_LINEAR_ATTENTION.get((primitive, case))
    if kind is None:
        return {}
    from jla.ops import linear_attention

    def function(impl: str) -> Function:
        def run(q, k, v, beta=None, log_decay=None):
            gates = {"beta": beta, "g": log_decay}
            return linear_attention(kind, q, k, v, impl=impl, **gates)[0]

        return run

    forms = ["chunked", "mosaic_gpu"] if jax.default_backend() == "gpu" else ["chunked"]
    if case == "Mamba-2":
        forms.remove("chunked")  # does not support groups of keys
    return {f"jax-linear-attention, {impl}": function(impl) for impl in forms}


def _torch_attention(q: Any, k: Any, v: Any) -> Any:
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# Module and name of the Triton kernels of flash-linear-attention, their names of our arguments, and options.
_GATED = {"q": "q", "k": "k", "v": "v", "log_decay": "g"}
_DELTA = _GATED | {"beta": "beta"}
_RWKV7 = {"q": "r", "k": "k", "v": "v", "log_decay": "w", "a": "a", "b": "b"}
_RWKV6 = {"q": "r", "k": "k", "v": "v", "log_decay": "w", "bonus": "u"}
_FLASH_LINEAR_ATTENTION: dict[tuple[str, str], tuple[str, str, dict[str, str], dict[str, Any]]] = {
    ("gated_linear_attention", "no decay"): (
        "linear_attn",
        "chunk_linear_attn",
        _GATED,
        {"normalize": False},
    ),
    ("gated_linear_attention", "scalar decay"): ("simple_gla", "chunk_simple_gla", _GATED, {}),
    ("gated_linear_attention", "scalar decay on one row"): ("simple_gla", "chunk_simple_gla", _GATED, {}),
    ("gated_linear_attention", "channel decay"): ("gla", "chunk_gla", _GATED, {}),
    ("gated_linear_attention", "channel decay, bonus"): ("rwkv6", "chunk_rwkv6", _RWKV6, {}),
    ("delta_rule", "delta rule"): ("delta_rule", "chunk_delta_rule", _DELTA, {}),
    ("delta_rule", "gated delta rule"): ("gated_delta_rule", "chunk_gated_delta_rule", _DELTA, {}),
    ("delta_rule", "gated delta rule on one row"): (
        "gated_delta_rule",
        "chunk_gated_delta_rule",
        _DELTA,
        {},
    ),
    ("delta_rule", "KDA"): ("kda", "chunk_kda", _DELTA, {}),
    ("dplr_delta_rule", "RWKV-7"): ("rwkv7", "chunk_rwkv7", _RWKV7, {"scale": 128**-0.5}),
}


def _fla_kernel(module: str, name: str, names: dict[str, str], options: dict[str, Any]) -> Function:
    kernel = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    # The library refuses gated gradients on Hopper with Triton 3.4 to 3.7.0, some of which are wrong; here the error is
    # shown beside the time.
    importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True

    def run(**arguments: Any) -> Any:
        return kernel(**{names[key]: value for key, value in arguments.items()}, **options)[0]

    return run
