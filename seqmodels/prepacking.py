"""Prompts side by side in full rows, and the state of each from that of the rows (see `layers.caches.prepacking`)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.mixer import MixerState
from layers.parts.cache import Cache
from layers.segments import Place
from layers.typing import Array, Int
from seqmodels.language_model import LanguageModelState


class Packed(NamedTuple):
    """Prompts without their last tokens, side by side.

    Attributes:
      inputs: tokens (n, t), 0 behind them.
      ids: the prompt of each token within its row, from 1; 0 is padding.
      row, start, length: where each prompt stands, (b,).
    """

    inputs: Int[np.ndarray, "n t"]
    ids: Int[np.ndarray, "n t"]
    row: Int[np.ndarray, "b"]
    start: Int[np.ndarray, "b"]
    length: Int[np.ndarray, "b"]


def pack(prompts: Sequence[np.ndarray]) -> Packed:
    """Returns the prompts in rows as long as the longest: the longest first, each in the first row that has room."""
    length = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    row, start = np.zeros((2, len(prompts)), np.int32)
    filled: list[int] = []
    numbers: list[int] = []
    ids_of = np.zeros(len(prompts), np.int32)
    for prompt in np.argsort(-length, kind="stable"):
        fits = [place for place, used in enumerate(filled) if used + length[prompt] <= length.max()]
        if not fits:
            fits = [len(filled)]
            filled.append(0)
            numbers.append(0)
        row[prompt], start[prompt] = fits[0], filled[fits[0]]
        filled[fits[0]] += int(length[prompt])
        numbers[fits[0]] += 1
        ids_of[prompt] = numbers[fits[0]]
    inputs, ids = np.zeros((2, len(filled), int(length.max())), np.int32)
    for number, prompt in enumerate(prompts):
        place = row[number], slice(start[number], start[number] + length[number])
        inputs[place], ids[place] = prompt[:-1], ids_of[number]
    return Packed(inputs, ids, row, start, length)


@partial(jax.jit, static_argnames=("slots",))
def unpacked(
    state: LanguageModelState,
    row: Int[Array, "b"],
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    *,
    slots: int,
) -> LanguageModelState:
    """Returns the state of each prompt after its tokens, from the state of rows that hold several.

    Args:
      row, start, length: see `Packed`.
      slots: slots of each prompt's cache.
    """
    index = jnp.arange(slots, dtype=jnp.int32)[None]
    live, begun = index < length[:, None], (length > 0).astype(jnp.int32)
    place = Place(begun, begun, length)

    def own(entry: Any) -> Any:
        found = entry[row[:, None], jnp.minimum(start[:, None] + index, entry.shape[1] - 1)]
        return jnp.where(live.reshape(*live.shape, *(1,) * (entry.ndim - 2)), found, 0)

    layers = []
    for one in state.layers:
        entries = tuple(map(own, one.carried.entries))
        cache = Cache(entries, live.astype(jnp.int32), jnp.where(live, index, 0), length)
        layers.append(MixerState(cache, place))
    return LanguageModelState(None if state.place is None else place, tuple(layers))
