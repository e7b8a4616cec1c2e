"""Names of results that a backward pass which recomputes layers does well to keep.

The output of attention and the log-sum-exp of its rows are as large as one activation of a layer, and take longer to compute
again than all others. States that cross the cuts of divided time are smaller still. `jax.checkpoint` with `policy` keeps both, so
that the forward pass of attention, and what devices send of keys or states, runs once (DistFlashAttn, Li et al. 2023,
arXiv:2310.03294).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"


def named(results: Any) -> Any:
    """Returns a tree of arrays, with the name that `policy` keeps; complex ones, which `jax.checkpoint` cannot, have none."""
    return jax.tree.map(lambda x: x if jnp.iscomplexobj(x) else checkpoint_name(x, NAME), results)


policy = jax.checkpoint_policies.save_only_these_names(NAME)
