"""Makes the tiny checkpoints of `tests/seqmodels/interop/data` with transformers, in an environment of their own.

    python -m venv /tmp/interop && /tmp/interop/bin/pip install torch 'transformers==5.24.0' safetensors
    /tmp/interop/bin/python tools/interop_data.py tests/seqmodels/interop/data [FAMILY ...]
    /tmp/interop/bin/python tools/interop_data.py adapter tests/seqmodels/interop/data/llama tests/seqmodels/interop/adapter
    /tmp/interop/bin/python tools/interop_data.py adapter_of_embedding tests/seqmodels/interop/data/llama \
        tests/seqmodels/interop/adapter_of_embeddings
    /tmp/interop/bin/python tools/interop_data.py adapter_of_experts tests/seqmodels/interop/data/gpt_oss \
        tests/seqmodels/interop/adapter_of_gpt_oss
    /tmp/interop/bin/python tools/interop_data.py adapter_of_experts tests/seqmodels/interop/data/qwen3_moe \
        tests/seqmodels/interop/adapter_of_qwen3_moe

Families of flash-linear-attention need it and pytest there, and others need that it is not there; the adapter needs peft.

BigBird's random blocks, of which theirs draws none in evaluation, are those of ours, and Nystromformer's coefficient is that of each
matrix.

Per family: config.json and model.safetensors as `save_pretrained` writes them, with random weights in which biases and norms
matter too, and expected.safetensors with tokens (2, 24), their logits (2, 24, v), and greedy (2, 32), with which the first 8
tokens continue; where positions depend on the number of tokens, also longer (1, 72) and longer_logits. Masked language models have no continuation, and where tokens have types also types and typed_logits. Encoder-decoders have a source (2, 24) besides, and their
continuation is that of the token 0. Every step of the continuation is a full pass, in float32. A continuation is kept only if no step is nearly a tie.
"""

import copy
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from interop_configs import FAMILIES, RANDOM_BLOCKS, VOCAB
from safetensors.numpy import save_file

TOKENS, PROMPT, NEW, LONGER = 24, 8, 32, 72
TIE = 2e-3
SOURCED = ("LongT5Config",)
MASKED = ("FNetConfig", "LongformerConfig", "BigBirdConfig", "NystromformerConfig")
DERIVED = re.compile(r"self_attn\.(slope_rate|(query|key|diagonal)_decay)$")
torch.set_num_threads(1)


def scramble(model, seed):
    """Random weights: matrices of a moderate size, vectors around their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 or name.endswith("A_log"):
                weight.add_(0.3 * noise)
            elif (
                ("conv" in name and weight.ndim == 3)
                or "embed" in name
                or "wte" in name
                or "lm_head" in name
                or "embed_out" in name
            ):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.2 * weight.shape[-1] ** -0.5 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def settle(model):
    """Makes what a masked language model computes a function of its row alone."""
    layers = [module for module in model.modules() if type(module).__name__ == "BigBirdBlockSparseAttention"]
    for layer, plan in zip(layers, RANDOM_BLOCKS, strict=False):
        blocks = [np.array(head)[:, None] for head in plan]
        layer._bigbird_block_rand_mask_with_head = lambda blocks=blocks, **_: blocks
    for module in model.modules():
        if type(module).__name__ == "NystromformerSelfAttention":
            module.init_option = "exact"


def make(folder, name):
    """Writes one family; returns whether a continuation without near ties was found."""
    kind, options = copy.deepcopy(FAMILIES[name])  # configs change what they are given
    if "fuse_norm" in options:
        import fla.layers.gla
        import fla.models
        import fla.modules.mlp
        import pytest

        from tests.parity.fla_layers import in_torch

        patch = pytest.MonkeyPatch()
        in_torch(patch)
        silu = torch.nn.functional.silu
        patch.setitem(fla.layers.gla.ACT2FN, "swish", silu)
        patch.setitem(fla.layers.gla.ACT2FN, "sqrelu", lambda x: torch.relu(x).square())
        patch.setattr(fla.modules.mlp, "swiglu", lambda gate, y: silu(gate) * y)
        config = getattr(fla.models, kind)(**options)
    else:
        config = getattr(transformers, kind)(**options)
        if options.get("weight_mode") == "fused":
            # Theirs fails for these weights, and `scramble` draws all of them.
            from transformers.models.xlstm.modeling_xlstm import xLSTMPreTrainedModel

            xLSTMPreTrainedModel._init_weights = lambda *_: None
    config._attn_implementation = "eager"
    auto = transformers.AutoModelForMaskedLM if kind in MASKED else transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForSeq2SeqLM if kind in SOURCED else auto
    model = auto.from_config(config, dtype=torch.float32).eval()
    settle(model)
    for seed in range(20):
        scramble(model, seed)
        rows = np.random.default_rng(seed).integers(1, VOCAB, (2, TOKENS))

        source = np.random.default_rng([seed, 1]).integers(1, VOCAB, (2, TOKENS))

        def logits(ids, source=source, **more):
            if kind in SOURCED:
                everything = torch.ones(source.shape, dtype=torch.long)
                more |= {"input_ids": torch.tensor(source), "attention_mask": everything, "use_cache": False}
                with torch.no_grad():
                    return model(decoder_input_ids=torch.tensor(ids), **more).logits.numpy()
            with torch.no_grad():
                return model(
                    torch.tensor(ids), **({} if kind in MASKED else {"use_cache": False}), **more
                ).logits.numpy()

        if kind in MASKED:
            made, gap = None, 0.0
            break
        made, gap = (np.zeros((2, 1), int) if kind in SOURCED else rows[:, :PROMPT]), np.inf
        given = made.shape[1]
        for _ in range(NEW):
            last = logits(made)[:, -1]
            best = np.sort(last, axis=-1)
            gap = min(gap, (best[:, -1] - best[:, -2]).min())
            made = np.concatenate([made, last.argmax(-1)[:, None]], axis=1)
        if gap > TIE and len(np.unique(made[:, given:])) > 2:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a varied continuation without near ties")
    # Buffers that follow from the config are saved by some models.
    tensors = {each: value for each, value in model.state_dict().items() if not DERIVED.search(each)}
    model.save_pretrained(folder / name, state_dict=tensors)
    (folder / name / "generation_config.json").unlink(missing_ok=True)
    expected = {"tokens": rows.astype(np.int32)}
    if kind in MASKED:
        # Told that nothing is padding, or theirs take a token for it.
        everything = (
            {} if kind == "FNetConfig" else {"attention_mask": torch.ones(rows.shape, dtype=torch.long)}
        )
        types = np.random.default_rng(seed).integers(0, options.get("type_vocab_size", 2), rows.shape)
        expected |= {"logits": logits(rows, **everything), "types": types.astype(np.int32)}
        expected["typed_logits"] = logits(rows, **everything, token_type_ids=torch.tensor(types))
    else:
        expected |= {"logits": logits(rows), "greedy": made[:, given:].astype(np.int32)}
        expected |= {"source": source.astype(np.int32)} if kind in SOURCED else {}
    if options.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope"):
        longer = np.random.default_rng(seed).integers(1, VOCAB, (1, LONGER))
        expected |= {"longer": longer.astype(np.int32), "longer_logits": logits(longer)}
    save_file(expected, folder / name / "expected.safetensors", {"transformers": transformers.__version__})
    return sum(file.stat().st_size for file in (folder / name).iterdir()), seed, gap


def make_adapter(folder, base, *, embedding=False, experts=False):
    """Writes a random adapter of a checkpoint with peft, also of its embeddings or stacked experts, and the logits of the two together."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    options = {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"down_proj": 3}}
    if embedding:
        options["target_modules"] += ["embed_tokens"]
    if experts:
        options |= {"target_modules": ["q_proj"], "rank_pattern": {"gate_up_proj": 3}}
        options["target_parameters"] = ["mlp.experts.down_proj", "0.mlp.experts.gate_up_proj"]
    options |= dict(r=2, lora_alpha=6, use_rslora=True, lora_dropout=0.1 if embedding else 0.0)
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        rows = np.random.default_rng(0).integers(1, VOCAB, (2, TOKENS))
        logits = model(torch.tensor(rows)).logits.numpy()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    save_file({"tokens": rows.astype(np.int32), "logits": logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    if sys.argv[1].startswith("adapter"):
        what = sys.argv[1].removeprefix("adapter").removeprefix("_of_")
        make_adapter(Path(sys.argv[3]), Path(sys.argv[2]), **{what: True} if what else {})
        raise SystemExit
    target = Path(sys.argv[1])
    for each in sys.argv[2:] or FAMILIES:
        size, seed, gap = make(target, each)
        print(f"{each:16} {size:7} bytes, seed {seed}, smallest gap {gap:.4f}")
