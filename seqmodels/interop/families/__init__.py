"""Families of published models by the names of their architectures."""

from seqmodels.interop.families import (
    bamba,
    bloom,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    jamba,
    kimi_linear,
    llama,
    mamba,
    mamba2,
    mixtral,
    mpt,
    olmo2,
    phi3,
    qwen3_next,
    recurrent_gemma,
)

FAMILIES = {
    family.architecture: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        mixtral.MIXTRAL,
        mixtral.QWEN3_MOE,
        olmo2.OLMO2,
        phi3.PHI3,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        gpt_neox.GPT_NEOX,
        gpt2.GPT2,
        bloom.BLOOM,
        mpt.MPT,
        mamba.MAMBA,
        mamba2.MAMBA2,
        mamba.FALCON_MAMBA,
        recurrent_gemma.RECURRENT_GEMMA,
        jamba.JAMBA,
        bamba.BAMBA,
        granite.GRANITE,
        granite.GRANITE_HYBRID,
        qwen3_next.QWEN3_NEXT,
        kimi_linear.KIMI_LINEAR,
    )
}
