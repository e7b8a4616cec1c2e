"""Names of results that a backward pass which recomputes layers does well to keep.

The output of attention and the log-sum-exp of its rows are as large as one activation of a layer, and take longer to compute
again than all others: `jax.checkpoint` with `policy` keeps them, so that the forward pass of attention, and what it sends
between devices, runs once (DistFlashAttn, Li et al. 2023, arXiv:2310.03294).
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_RESULTS = "attention_results"


def named(results: Any) -> Any:
    """Returns the results of attention, a tree of arrays, with the name that `policy` keeps."""
    return jax.tree.map(lambda x: checkpoint_name(x, _RESULTS), results)


policy = jax.checkpoint_policies.save_only_these_names(_RESULTS)
