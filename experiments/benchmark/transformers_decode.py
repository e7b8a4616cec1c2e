"""Steps of generation by transformers: the static cache and the compiled forward of its documentation, in bfloat16."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WARM_UP = 8  # steps before those that are timed, in which the forward is compiled and recorded


def measure(
    folder: Path, *, batches: Sequence[int], context: int, block: int, blocks: int
) -> dict[str, Any]:
    """Returns the rate of greedy tokens after a random context for each number of rows.

    The cache has room for `block` times `blocks` new tokens, of which all blocks but the first are timed.
    """
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    mode = {"mode": "reduce-overhead"} if device == "cuda" else {}
    forward = torch.compile(model.forward, fullgraph=True, **mode)
    steps = [
        _continued(torch, transformers, model, forward, batch, context, block, blocks) for batch in batches
    ]
    return dict(
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        context=context,
        torch=torch.__version__,
        transformers=transformers.__version__,
        attention=model.config._attn_implementation,
        steps=steps,
    )


def _continued(torch, transformers, model, forward, batch, context, block, blocks) -> dict[str, Any]:
    new = block * blocks
    prompts = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + new)
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        place = torch.tensor([[context]], device=model.device)

        def step(token, place):
            # What a recorded step returns is overwritten by the next.
            logits = forward(
                token, position_ids=place.expand(batch, 1), past_key_values=cache, use_cache=True
            ).logits
            return logits[:, -1:].argmax(-1).clone(), place + 1

        for _ in range(max(WARM_UP, block)):
            token, place = step(token, place)
        token.sum().item()
        first, start = time.perf_counter() - start, time.perf_counter()
        for _ in range((blocks - 1) * block - max(0, WARM_UP - block)):
            token, place = step(token, place)
        token.sum().item()
    seconds, count = time.perf_counter() - start, (blocks - 1) * block - max(0, WARM_UP - block)
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    return dict(
        batch=batch,
        context=context,
        tokens_per_second=batch * count / seconds,
        milliseconds=1e3 * seconds / count,
        first_block_seconds=first,
        peak_bytes=peak,
    )
