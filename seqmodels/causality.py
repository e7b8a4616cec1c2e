"""The check that no output of a stack depends on later inputs."""

from layers.norms import NORMS, causal_norms
from seqmodels.stack import Stack


def check_causal(stack: Stack, model: str) -> None:
    """Raises ValueError if the norm or a mixer of a stack is not causal.

    Args:
      model: what needs a causal stack, such as "a language model".
    """
    config = stack.config
    if config.norm in NORMS and config.norm not in causal_norms():
        raise ValueError(
            f"norm={config.norm!r} takes statistics over time: in training, {model} would see the tokens that "
            f"it predicts; use {' or '.join(map(repr, causal_norms()))}"
        )
    for layer, mixer in stack.mixers():
        if not mixer.causal:
            raise ValueError(f"layer {layer} ({config.mixer_of(layer)[0]}) is not causal; {model} must be")
