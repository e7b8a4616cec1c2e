"""What all policies have in common: names, papers, types, and states that a mixer takes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import list as lists
from layers.caches import CACHES, read_cache
from layers.caches.attention_gate import AttentionGate
from layers.caches.locret import Locret
from layers.caches.trained import Trained
from tests.layers.caches.reading import PROMPT, STEPS, WIDTH, layer, run

# What a policy cannot do without, and small sizes.
OPTIONS = {
    "cake": "budget=8, window=4",
    "duoattention": "gates=[[0.2, 0.9]], sinks=2, recent=4",
    "headkv": "importance=[[1, 3]], budget=8, window=4",
    "kivi": "group=4, residual=8",
    "hip": "budget=4, window=2, queries=2, block=2",
    "infllm": "budget=4, window=4, sinks=1, unit=2, representatives=1",
    "longheads": "budget=6, chunk=3",
    "lserve": "gates=[[0.2, 0.9]], sinks=2, recent=4, budget=4, page=4, logical=2",
    "moa": "alphas=[[0, 4]], betas=[[0.5, 0.1]], sinks=2, least=4",
    "sale": "window=2, sinks=1, queries=2, block=2",
    "pyramidkv": "budget=8, window=4",
    "sirllm": "budget=8, sinks=2, recent=4",
    "shadowkv": "budget=4, rank=4, chunk=2, outliers=1, local=1",
    "snapkv": "budget=8, window=4",
    "squeezed": "window=4",
}


# Those that are given arrays.
MADE = {
    "attention_gate": AttentionGate(
        gates=Trained(
            [
                {name: np.ones((32, 1, 2)) for name in ("query", "key", "value")}
                | dict(output=np.ones((1, 2, 2)), bias=np.ones(2))
            ]
        ),
        budget=6,
        chunk=4,
    ),
    "locret": Locret(
        heads=Trained([dict(first=np.ones((32, 3)), second=np.ones((3, 2)))]), budget=6, recent=2, chunk=4
    ),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", CACHES)
def test_every_policy_takes_bfloat16(name):
    policy = MADE[name] if name in MADE else read_cache(f"{name}({OPTIONS.get(name, '')})")
    x = jax.ShapeDtypeStruct((2, PROMPT + STEPS, WIDTH), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, PROMPT), jnp.int32)
    with jax.numpy_dtype_promotion("strict"):
        y, outputs, *_ = jax.eval_shape(lambda x, ids: run(layer(dtype="bfloat16"), x, ids, policy), x, ids)
    assert (y.shape, y.dtype) == ((2, PROMPT, WIDTH), jnp.bfloat16)
    assert (outputs.shape, outputs.dtype) == ((2, STEPS, WIDTH), jnp.bfloat16)


def test_every_policy_is_listed_with_its_paper():
    entries = {entry.name: entry for entry in lists.caches()}
    assert set(entries) == set(CACHES)
    assert all("arXiv:" in entry.paper for entry in entries.values())
    assert read_cache("snapkv").budget == 2048
    assert read_cache(read_cache("h2o")) == CACHES["h2o"]()
