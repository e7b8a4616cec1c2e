"""The mixers under the shared contract suite: one line each."""

MIXERS = {
    "s5": ("s5", {"state_size": 8, "blocks": 2}),
    "s5-bidirectional": (
        "s5",
        {"state_size": 8, "bidirectional": True, "discretization": "bilinear", "clip_eigs": True},
    ),
    "s5-full-spectrum": (
        "s5",
        {"state_size": 4, "conj_sym": False, "c_init": "complex_normal", "step_rescale": 2.0},
    ),
    "attention": ("attention", {"heads": 4, "kv_heads": 2, "bias": True}),
    "attention-window": ("attention", {"heads": 2, "window": 5, "position": "none", "qk_norm": True}),
    "attention-bidirectional": ("attention", {"heads": 2, "causal": False, "head_dim": 6}),
}
