"""Schedules: the factor on all learning rates by step."""

from typing import Any

import jax.numpy as jnp

from layers.typing import Array, Float, Int

SCHEDULES = ("cosine", "constant", "wsd", "rsqrt")


def schedule(
    config: Any, step: Int[Array, ""] | int, *, warmup_steps: int, total_steps: int
) -> Float[Array, ""]:
    """Returns the factor s on all learning rates in update number `step`, counted from 0.

        s = (step + 1) / w                                      for step < w, the warm-up
        cosine:    f + (1 - f) (1 + cos(pi x)) / 2              x = (step - w) / (total - w), clipped to 0 .. 1
        constant:  1
        wsd:       1, then f + (1 - f) (total - step) / n       in the last n = decay_fraction * total steps
        rsqrt:     sqrt(max(w, 1) / max(step, w, 1))

    with f = `final_learning_rate`. Cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983). Warm-up, stable, decay (wsd):
    Hu et al. 2024 (arXiv:2404.06395). Rsqrt: Vaswani et al. 2017 (arXiv:1706.03762).

    Args:
      config: an `OptimizerConfig`.
    """
    step = jnp.asarray(step, jnp.float32)
    last = config.final_learning_rate
    if config.schedule == "cosine":
        x = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        factor = last + (1 - last) * 0.5 * (1 + jnp.cos(jnp.pi * x))
    elif config.schedule == "wsd":
        decay = max(1.0, config.decay_fraction * total_steps)
        factor = last + (1 - last) * jnp.clip((total_steps - step) / decay, 0.0, 1.0)
    elif config.schedule == "rsqrt":
        begin = max(warmup_steps, 1)
        factor = jnp.sqrt(begin / jnp.maximum(step, begin))
    else:
        factor = jnp.ones_like(step)
    return jnp.where(step < warmup_steps, (step + 1) / max(warmup_steps, 1), factor)
