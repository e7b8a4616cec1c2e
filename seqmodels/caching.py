"""Cache policies in whole models: in which layers they act, and where in generation.

A policy replaces the state of every layer whose cache it may keep (`Attention.takes_cache_policy`). The prompt is read into what
`CachePolicy.begin` makes, and becomes what `CachePolicy.compressed` makes after its last token. Other layers keep their states.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches import CachePolicy
from layers.mixer import MixerState
from layers.typing import Array, Bool, Float
from seqmodels.language_model import LanguageModel, LanguageModelState

# Slots of what is kept are a multiple of this where budgets differ.
STEP = 16


def layers_of(model: LanguageModel) -> dict[int, Any]:
    """Returns the mixers whose caches a policy keeps, by layer."""
    found = {layer: model.stack.block(layer).mixer for layer in range(model.config.stack.depth)}
    return {layer: mixer for layer, mixer in found.items() if getattr(mixer, "takes_cache_policy", False)}


def check(
    model: LanguageModel,
    policy: CachePolicy,
    longest: int,
    new: int,
    *,
    filters: bool = False,
    name: str | None = "cache",
) -> None:
    """Raises ValueError unless the policy can keep caches of the model.

    Args:
      longest: tokens of the longest prompt.
      new: the most new tokens.
      filters: whether prompts are shortened as a policy with `filters` says, which `seqmodels.generate` does.
      name: the argument that the policy was given by, for messages; None if it was not.
    """
    if policy.filters and not filters:
        raise ValueError(
            f"cache={type(policy).__name__} chooses the tokens of prompts that are continued; expected another policy where all tokens "
            "are read"
        )
    mixers, stack = layers_of(model), model.config.stack
    if not mixers:
        names = ", ".join(dict.fromkeys(stack.mixer_of(layer)[0] for layer in range(stack.depth)))
        found = f"no layer ({names}) holds keys and values of all tokens; expected a model with a mixer such as 'attention' without window"
        raise ValueError(
            f"model: {found}"
            if name is None
            else f"{name}={type(policy).__name__} has nothing to act on: {found}, or {name}=None"
        )
    other = [layer for layer in range(stack.depth) if layer not in mixers]
    if policy.packs and other:
        raise ValueError(
            f"cache={type(policy).__name__} reads several prompts per row, and layer {other[0]} ({stack.mixer_of(other[0])[0]}) does not "
            "tell their states apart; expected a model whose layers all hold keys and values of all tokens"
        )
    if policy.packs and stack.shared is not None:
        raise ValueError(
            f"cache={type(policy).__name__} reads several prompts per row, and shared blocks (shared.layers={stack.shared.layers}) do "
            "not tell their states apart; expected a model with shared=None"
        )
    policy.check(longest + new - 1, {layer: mixer.config for layer, mixer in mixers.items()})


def begin(model: LanguageModel, policy: CachePolicy, rows: int, slots: int) -> LanguageModelState:
    """Returns the state before the first token, in which the policy holds the caches, with `slots` for the prompt."""
    state, layers = model.init_state(rows, max_length=slots), {}
    for place, (layer, mixer) in enumerate(layers_of(model).items()):
        layers[layer] = policy.begin(state.layers[layer].carried, mixer.config.heads, place)
    return with_carried(state, layers)


def compress(
    model: LanguageModel,
    state: LanguageModelState,
    *,
    policy: CachePolicy,
    room: int,
    call: int,
    surprise: Float[Array, "b s"] | None = None,
) -> LanguageModelState:
    """Returns the state after a prompt with what the policy keeps of it.

    Args:
      room: the most tokens that follow.
      call: the most of them in one call.
      surprise: -log p of the tokens of the prompt, one per slot of a cache, if the policy needs it.
    """
    budgets = _budgets(model, state, policy)
    # What is compiled depends on the largest budget of each layer.
    counts = None if budgets is None else tuple(-(-int(one.max()) // STEP) * STEP for one in budgets)
    return _compressed(model, state, policy, budgets, counts, room, call, surprise)


@partial(jax.jit, static_argnums=(2,))
def _budgets(model, state, policy):
    prompts, views, _ = _read(model, state)
    return policy.budgets(prompts, views)


@partial(jax.jit, static_argnums=(2, 4, 5, 6))
def _compressed(model, state, policy, budgets, counts, room, call, surprise):
    prompts, views, layers = _read(model, state)
    kept = policy.compressed(
        prompts, views, room=room, call=call, budgets=budgets, counts=counts, surprise=surprise
    )
    return with_carried(state, dict(zip(layers, kept, strict=True)))


def _read(model, state):
    """Returns the prompts, the views and the numbers of the layers whose caches a policy keeps."""
    mixers = layers_of(model)
    prompts = [state.layers[layer].carried for layer in mixers]
    return prompts, [mixer.view() for mixer in mixers.values()], list(mixers)


@partial(jax.jit, static_argnums=(2,))
def chosen(model: LanguageModel, state: LanguageModelState, policy: CachePolicy) -> Bool[Array, "b s"]:
    """Returns which tokens of the prompts that the state has read a policy that filters leaves, in the slots of its layer."""
    del model
    return policy.chosen(state.layers[policy.layer].carried)


@partial(jax.jit, static_argnames=("policy", "tokens", "rows", "slots"))
def share(
    model: LanguageModel,
    state: LanguageModelState,
    *,
    policy: CachePolicy,
    tokens: int,
    rows: int,
    slots: int,
) -> LanguageModelState:
    """Returns the state of rows that all begin with what one row has read.

    Args:
      state: of that row, after its `tokens` tokens.
      slots: slots of each row for tokens of its own.
    """
    empty, carried = model.init_state(rows, max_length=slots), {}
    for layer in layers_of(model):
        carried[layer] = policy.shared(state.layers[layer].carried, tokens, empty.layers[layer].carried)
    layers = tuple(
        one._replace(carried=None) if layer in carried else one for layer, one in enumerate(state.layers)
    )
    state = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), state._replace(layers=layers))
    return with_carried(state, carried)


def with_carried(state: LanguageModelState, carried: dict[int, Any]) -> LanguageModelState:
    """Returns the state with what some layers carry replaced."""
    layers = tuple(
        MixerState(carried[layer], one.place) if layer in carried else one
        for layer, one in enumerate(state.layers)
    )
    return state._replace(layers=layers)
