"""The configs of the tiny checkpoints that `interop_data.py` makes: one or more of each family."""

VOCAB, WIDTH = 40, 16

COMMON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
DECODER = COMMON | HEADS
# A width whose root is rounded in bfloat16.
GEMMA = DECODER | {"hidden_size": 24}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
FLA = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 24}
FLA |= {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False}
# More than 40 tokens, up to which both leave angles as they were trained, and fewer than 72.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 48,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 4,
    "mamba_d_head": 8,
    "mamba_chunk_size": 8,
}
ENCODER = COMMON | {"num_attention_heads": 4, "intermediate_size": 24}
LONGT5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
LONGT5 |= {"local_radius": 3, "global_block_size": 4, "decoder_start_token_id": 0}
LONGT5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.7,
}

NEMOTRON_MOE = DECODER | {
    "head_dim": 8,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "num_hidden_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 4,
    "ssm_state_size": 4,
    "n_groups": 2,
    "chunk_size": 8,
    "time_step_min": 1e-9,
    "n_routed_experts": 4,
    "n_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
}
XLSTM = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "ffn_proj_factor": 1.5,
    "ffn_round_up_to_multiple_of": 8,
    "autocast_kernel_dtype": "float32",
    "gate_soft_cap": 2.0,
    "output_logit_soft_cap": 3.0,
}

# Names of folders: the class of the config, and its options.
FAMILIES = {
    "llama": ("LlamaConfig", DECODER | {"rope_parameters": LLAMA3}),
    "llama_yarn": (
        "LlamaConfig",
        DECODER | {"rope_parameters": YARN, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": ("MistralConfig", DECODER | {"sliding_window": 7, "head_dim": 8, "rope_parameters": LINEAR}),
    "qwen2": ("Qwen2Config", DECODER | {"rope_parameters": ROPE}),
    "qwen3": ("Qwen3Config", DECODER | {"head_dim": 8, "rope_parameters": ROPE, "rms_norm_eps": 1e-5}),
    "gpt_neox": (
        "GPTNeoXConfig",
        COMMON
        | {
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24},
    ),
    "mamba": ("MambaConfig", COMMON | {"state_size": 4, "time_step_rank": 3}),
    "mamba2": (
        "Mamba2Config",
        COMMON | {"state_size": 4, "head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 8},
    ),
    "falcon_mamba": ("FalconMambaConfig", COMMON | {"state_size": 4, "time_step_rank": 3}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        GEMMA
        | {
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "attention_window_size": 7,
            "logits_soft_cap": 3.0,
        },
    ),
    "gemma": ("GemmaConfig", GEMMA | {"head_dim": 8, "rope_parameters": ROPE}),
    "gemma2": (
        "Gemma2Config",
        GEMMA
        | {
            "head_dim": 8,
            "rope_parameters": ROPE,
            "sliding_window": 7,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "head_dim": 8,
            "sliding_window": 7,
            "query_pre_attn_scalar": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": ROPE, "full_attention": LINEAR},
        },
    ),
    "llama_dynamic": ("LlamaConfig", DECODER | {"rope_parameters": DYNAMIC}),
    "phi3_long": (
        "Phi3Config",
        DECODER | {"rope_parameters": LONG, "pad_token_id": 0, "original_max_position_embeddings": 48},
    ),
    "bamba": (
        "BambaConfig",
        DECODER | MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1], "rope_parameters": ROPE},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        DECODER
        | {
            "head_dim": 8,
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
            "num_hidden_layers": 5,
            "mamba_num_heads": 6,
            "mamba_head_dim": 4,
            "ssm_state_size": 4,
            "n_groups": 2,
            "chunk_size": 8,
            "time_step_min": 1e-9,
        },
    ),
    "nemotron_h_moe": ("NemotronHConfig", NEMOTRON_MOE),
    "nemotron_h_latent": ("NemotronHConfig", NEMOTRON_MOE | {"moe_latent_size": 12}),
    "falcon_h1": (
        "FalconH1Config",
        DECODER
        | MAMBA2
        | {
            "mamba_d_ssm": 24,
            "mamba_n_heads": 3,
            "mamba_n_groups": 1,
            "rope_parameters": ROPE,
            "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.7,
            "mlp_multipliers": [0.8, 1.3],
            "key_multiplier": 1.4,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 1.2,
            "ssm_in_multiplier": 1.1,
            "ssm_out_multiplier": 0.6,
            "ssm_multipliers": [0.7, 1.3, 0.9, 1.2, 1.5],
        },
    ),
    "zamba2": (
        "Zamba2Config",
        DECODER
        | {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 12,
            "layers_block_type": ["hybrid", "hybrid", "linear_attention", "hybrid"],
            "n_mamba_heads": 4,
            "mamba_ngroups": 2,
            "mamba_d_state": 4,
            "chunk_size": 8,
            "time_step_min": 0.1,
            "num_mem_blocks": 2,
            "adapter_rank": 2,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "rope_parameters": ROPE,
        },
    ),
    "granite": ("GraniteConfig", DECODER | GRANITE | {"rope_parameters": ROPE}),
    "granite_moe_hybrid": (
        "GraniteMoeHybridConfig",
        DECODER
        | MAMBA2
        | GRANITE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 8,
            "shared_intermediate_size": 16,
        },
    ),
    "falcon": (
        "FalconConfig",
        COMMON
        | {"num_attention_heads": 4, "ffn_hidden_size": 24, "rope_parameters": ROPE, "multi_query": True},
    ),
    "falcon_grouped": (
        "FalconConfig",
        COMMON
        | {
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 24,
            "rope_parameters": ROPE,
            "new_decoder_architecture": True,
        },
    ),
    "rwkv4": (
        "RwkvConfig",
        COMMON | {"attention_hidden_size": 16, "intermediate_size": 24, "rescale_every": 0},
    ),
    "minimax": (
        "MiniMaxConfig",
        DECODER
        | {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 12,
            "block_size": 5,
            "rope_parameters": ROPE,
            **{
                f"{part}_{factor}_factor": value
                for part in ("full_attn", "linear_attn", "mlp")
                for factor, value in (("alpha", 1.7), ("beta", 0.8))
            },
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        DECODER
        | {
            "head_dim": 8,
            "sliding_window": 7,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 12,
            "swiglu_limit": 1.0,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "lfm2": (
        "Lfm2Config",
        DECODER
        | {
            "layer_types": ["conv", "full_attention"],
            "rope_parameters": ROPE,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        COMMON
        | {
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "moe_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "pad_token_id": 0,
        },
    ),
    "gla": ("GLAConfig", FLA | {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True}),
    "delta_net": ("DeltaNetConfig", FLA | {"num_heads": 2, "use_gate": True, "allow_neg_eigval": True}),
    "gated_deltanet": (
        "GatedDeltaNetConfig",
        FLA | {"num_heads": 2, "num_v_heads": 4, "head_dim": 4, "expand_v": 2.0},
    ),
    "retnet": ("RetNetConfig", FLA | {"num_heads": 2, "num_kv_heads": 1, "expand_v": 2.0}),
    "hgrn2": ("HGRN2Config", FLA | {"num_hidden_layers": 3, "expand_ratio": 8}),
    "forgetting_transformer": (
        "ForgettingTransformerConfig",
        FLA | {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "use_output_gate": True},
    ),
    "gated_deltaproduct": (
        "GatedDeltaProductConfig",
        FLA
        | {
            "num_heads": 2,
            "head_dim": 4,
            "num_householder": 2,
            "use_forget_gate": True,
            "allow_neg_eigval": True,
        },
    ),
    "comba": ("CombaConfig", FLA | {"num_heads": 2, "head_dim": 4, "correction_factor": 0.5}),
    "rwkv6": (
        "RWKV6Config",
        FLA | {"num_heads": 2, "expand_k": 1.0, "proj_low_rank_dim": 3, "gate_low_rank_dim": 2},
    ),
    "rwkv7": (
        "RWKV7Config",
        FLA
        | {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "decay_low_rank_dim": 3,
            "gate_low_rank_dim": 5,
            "a_low_rank_dim": 2,
            "v_low_rank_dim": 4,
        },
    ),
    "kda": ("KDAConfig", FLA | {"num_heads": 2, "head_dim": 8}),
    "olmo2": ("Olmo2Config", DECODER | {"rope_parameters": ROPE}),
    "phi3": ("Phi3Config", DECODER | {"rope_parameters": ROPE, "pad_token_id": 0}),
    "mixtral": (
        "MixtralConfig",
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        DECODER
        | {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "rope_parameters": ROPE,
        },
    ),
    "xlstm": ("xLSTMConfig", XLSTM),
    "xlstm_fused": ("xLSTMConfig", XLSTM | {"weight_mode": "fused"}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2, "n_head": 2}),
    "mpt": (
        "MptConfig",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "n_layers": 2,
            "n_heads": 2,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
    ),
    "jamba": (
        "JambaConfig",
        DECODER
        | {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 4,
            "expert_layer_offset": 2,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 3,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        DECODER
        | {
            "head_dim": 8,
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "fnet": ("FNetConfig", COMMON | {"intermediate_size": 24, "type_vocab_size": 3}),
    "longformer": ("LongformerConfig", ENCODER | {"attention_window": [8, 4], "pad_token_id": 0}),
    # Blocks few enough that 24 tokens are more than those that would be read in full.
    "big_bird": (
        "BigBirdConfig",
        ENCODER | {"block_size": 2, "num_random_blocks": 1, "num_attention_heads": 2, "sep_token_id": 2},
    ),
    "big_bird_full": (
        "BigBirdConfig",
        ENCODER | {"attention_type": "original_full", "rescale_embeddings": True, "sep_token_id": 2},
    ),
    "longt5": ("LongT5Config", LONGT5 | {"encoder_attention_type": "local", "feed_forward_proj": "relu"}),
    "longt5_global": ("LongT5Config", LONGT5 | GATED | {"encoder_attention_type": "transient-global"}),
    "nystromformer": (
        "NystromformerConfig",
        ENCODER | {"num_landmarks": 6, "segment_means_seq_len": 24, "conv_kernel_size": 5},
    ),
}
# The random block of each of the blocks 1 to 10 of 12 by layer and head, as `layers.mixers.attention.bigbird` draws it.
RANDOM_BLOCKS = [
    [[5, 4, 7, 8, 8, 1, 2, 3, 3, 6], [6, 4, 5, 10, 7, 9, 10, 4, 1, 3]],
    [[6, 10, 6, 6, 1, 1, 2, 10, 4, 4], [3, 9, 5, 10, 9, 3, 3, 10, 4, 6]],
]
