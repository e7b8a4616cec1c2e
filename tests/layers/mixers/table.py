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
    "attention-sinks": (
        "attention",
        {
            "heads": 2,
            "window": 4,
            "sink_tokens": 2,
            "sink_logits": True,
            "logit_cap": 5.0,
            "position": "alibi",
        },
    ),
    "attention-t5": ("attention", {"heads": 2, "position": "t5", "scale": 1.0}),
    "gated_attention": ("gated_attention", {"heads": 2, "kv_heads": 1, "head_dim": 8}),
    "gated_attention-value": (
        "gated_attention",
        {"heads": 2, "kv_heads": 1, "head_dim": 8, "gate": "value", "gate_size": "headwise"},
    ),
    "selective_attention": ("selective_attention", {"heads": 2, "window": 6}),
    "mla": (
        "mla",
        {"heads": 2, "latent": 6, "query_latent": 5, "head_dim": 4, "rope_dim": 2, "value_dim": 3},
    ),
    "attention-fire": ("attention", {"heads": 2, "position": {"name": "fire", "width": 4}}),
    "attention-bidirectional": ("attention", {"heads": 2, "causal": False, "head_dim": 6}),
    "mamba": ("mamba", {"state_size": 4, "dt_rank": 3, "bias": True}),
    "mamba2": ("mamba2", {"state_size": 4, "head_dim": 4, "groups": 2}),
    "gla": ("gla", {"heads": 2, "gate_rank": 4}),
    "s4d": ("s4d", {"state_size": 4, "init": "inv", "systems": 2}),
    "s4d-bidirectional": ("s4d", {"state_size": 4, "bidirectional": True, "discretization": "bilinear"}),
    "deltanet": ("deltanet", {"heads": 2, "gate": True, "negative_eigenvalues": True}),
    "gated_deltanet": ("gated_deltanet", {"heads": 1, "value_heads": 2, "key_dim": 4, "value_dim": 4}),
    "kda": ("kda", {"heads": 2}),
    "lru": ("lru", {"state_size": 4}),
    "rg-lru": ("rg_lru", {"heads": 2, "state_size": 6}),
    "retnet": ("retnet", {"heads": 2, "affine": True}),
    "lightning_attention": ("lightning_attention", {"heads": 2, "layer": 1, "depth": 3}),
    "s4": ("s4", {"state_size": 4}),
    "s4-truncated": ("s4", {"state_size": 4, "max_length": 24, "systems": 2, "dt_min": 0.01}),
    "fnet": ("fnet", {}),
    "hgrn": ("hgrn", {"layer": 1, "depth": 2}),
    "hgrn-real": ("hgrn", {"state": "real", "norm": "rms_norm", "bias": False, "layer": 1, "depth": 2}),
    "dss": ("dss", {"state_size": 4, "max_length": 32}),
    "dss-exp": ("dss", {"state_size": 4, "kernel": "exp"}),
    "rwkv4": ("rwkv4", {"zero_init": False, "layer": 1, "depth": 2}),
    "lstm": ("lstm", {"hidden_size": 6}),
    "linear_attention": ("linear_attention", {"heads": 2}),
    "linear_attention-bidirectional": ("linear_attention", {"heads": 2, "causal": False}),
    "performer": ("performer", {"heads": 2, "features": 6}),
    "hypermixer": ("hypermixer", {"hidden": 12, "heads": 2}),
    "linformer": ("linformer", {"max_length": 24, "projected": 6, "heads": 2}),
}

# Mixers whose derivative with respect to later inputs is zero but for the rounding of Fourier transforms.
BY_FOURIER_TRANSFORM = {"dss", "s4", "s4d"}
