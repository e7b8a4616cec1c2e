"""Families of published models by the names of their architectures."""

from seqmodels.interop.families import gpt_neox, llama, mamba, mamba2, recurrent_gemma

FAMILIES = {
    family.architecture: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        gpt_neox.GPT_NEOX,
        mamba.MAMBA,
        mamba2.MAMBA2,
        mamba.FALCON_MAMBA,
        recurrent_gemma.RECURRENT_GEMMA,
    )
}
