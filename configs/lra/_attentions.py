"""Kinds of attention beside softmax attention: ListOps, classification of bytes, and recall, in short trainings of one recipe.

    python -m experiments.sweep --file=configs/lra/_attentions.py --out=runs/attentions --devices 0 1

Each has 3,000 steps of ListOps with 32 sequences, 2,000 of package_text with 32 and 2,000 of MQAR (8 pairs in 64 tokens). Accuracies compare with each
other only, as the published ones come from longer trainings.
"""

BIDIRECTIONAL = (
    *("attention", "local_attention", "longformer", "bigbird", "etc", "longt5", "nystromformer", "luna", "reformer", "informer"),
    *("shifted_sparse", "moba", "power_attention", "strided_attention", "core_context", "linformer", "performer"),
    *("linear_attention", "fnet"),
)  # fmt: skip
CAUSAL = (
    *("attention", "moba", "nsa", "dsa", "power_attention", "strided_attention", "core_context", "landmark"),
    *("differential_attention", "forgetting_attention", "path_attention", "selective_attention", "softplus_attention"),
    *("based", "linear_attention", "performer"),
)  # fmt: skip


def get_sweep():
    for mixer in BIDIRECTIONAL:
        yield {
            "config": f"configs/lra/listops.py:mixer={mixer}",
            "train.steps": 3000,
            "train.epochs": None,
            "train.batch_size": 32,
        }
        if mixer != "local_attention":  # a window of `attention`, not a mixer of its own
            yield {
                "config": f"configs/standins/package_text.py:mixer={mixer}",
                "train.steps": 2000,
                "train.epochs": None,
            }
    for mixer in CAUSAL:
        yield {"config": f"configs/synthetic/mqar.py:mixer={mixer}", "train.steps": 2000}
