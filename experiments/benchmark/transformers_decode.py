"""Steps of generation by transformers: the static cache and the compiled forward of its documentation, in bfloat16."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def measure(folder: Path, *, batches: Sequence[int], context: int, block: int, blocks: int) -> dict[str, Any]:
    """Returns the rate of greedy tokens after a random context for each number of rows.

    The cache has room for `blocks` blocks of new tokens, of which all but the first are timed, in a second run.
    """
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    mode = {"mode": "reduce-overhead"} if device == "cuda" else {}
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **mode)
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
    prompts = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + block * blocks)

    def step(token, place):
        # What a recorded step returns is overwritten by the next.
        logits = forward(
            token, position_ids=place.expand(batch, 1), past_key_values=cache, use_cache=True
        ).logits
        return logits[:, -1:].argmax(-1).clone(), place + 1

    def run() -> tuple[float, float]:
        """Returns the seconds until the end of the first block, and those of the others."""
        start = time.perf_counter()
        logits = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token, place = logits[:, -1:].argmax(-1), torch.tensor([[context]], device=model.device)
        seconds = []
        for steps in (block, (blocks - 1) * block):
            for _ in range(steps):
                token, place = step(token, place)
            token.sum().item()
            seconds.append(time.perf_counter() - start)
        return seconds[0], seconds[1] - seconds[0]

    with torch.no_grad():
        run()  # in which the forward is compiled and recorded
        cache.reset()
        first, seconds = run()
    count = (blocks - 1) * block
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    return dict(
        batch=batch,
        context=context,
        tokens_per_second=batch * count / seconds,
        milliseconds=1e3 * seconds / count,
        first_block_seconds=first,
        peak_bytes=peak,
    )
