"""The compiled loop of generation: one token of each row per call of the model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.typing import Array, Bool, Float, Int, Key
from seqmodels.common_state import lean, whole
from seqmodels.language_model import LanguageModel, LanguageModelState
from seqmodels.sampling import Sampling, choose

# Stands where a stop sequence is shorter than the longest, and fits every token.
ANY = -1
# Stands before the first token of the output, and fits no token of a stop sequence.
NOTHING = -2
# On a GPU the whole loop is one CUDA graph, its condition included, unless it holds what no graph can, such as sorting; by default the
# host waits for the condition of each step and launches the graph of the next. Kernels that do not depend on each other run at the same
# time. The pass that is left out turns products with one row into rounded products and sums, which write matrices of that size.
GPU_OPTIONS = (
    (
        "xla_gpu_enable_command_buffer",
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    ),
    ("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT"),
    ("xla_disable_hlo_passes", "dot-strength-reduction"),
)


class Generation(NamedTuple):
    """New tokens.

    Attributes:
      tokens: new tokens of each row, with the stop sequence that ends it; 0 behind them.
      lengths: number of new tokens of each row.
      log_probabilities: log-probability of each new token under the model, before the repetition penalty, the temperature
        and the filters; 0 behind them.
      calls: number of calls of the model that gave them, for all rows at once; those that read prompts are not counted.
    """

    tokens: Int[np.ndarray, "b n"]
    lengths: Int[np.ndarray, "b"]
    log_probabilities: Float[np.ndarray, "b n"]
    calls: int = 0


class Rows(NamedTuple):
    """Where the rows of a batch stand between two steps.

    Attributes:
      state: state of the model after all tokens but the last; with drafts, after all but some of the last.
      token: last token of each row.
      stopped: whether the output of a row is complete.
      recent: last tokens of the output, as many as the longest stop sequence has; None without stop sequences.
      seen: tokens that occurred; None without a repetition penalty.
    """

    state: LanguageModelState
    token: Int[Array, "b"]
    stopped: Bool[Array, "b"]
    recent: Int[Array, "b l"] | None
    seen: Bool[Array, "b v"] | None


def empty(count: int, size: int) -> Generation:
    """Returns room for `size` new tokens of each of `count` rows."""
    return Generation(
        jnp.zeros((count, size), jnp.int32),
        jnp.zeros(count, jnp.int32),
        jnp.zeros((count, size), jnp.float32),
        jnp.int32(0),
    )


def keys_of_rows(key: Key[Array, ""], count: int) -> Key[Array, "b"]:
    """Returns a key for each row; with the number of a new token it gives the key that the token is sampled with."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


class Structure:
    """The structure of a model as a tree; equal to itself alone, so that it is compared at no cost."""

    def __init__(self, tree: Any):
        self.tree = tree


class Flat(NamedTuple):
    """A model as arrays, which a call takes as they are: for a module, JAX visits every layer in Python."""

    structure: Structure
    leaves: list[Any]


_structures: dict[Any, Structure] = {}


def flat(model: LanguageModel) -> Flat:
    """Returns the arrays of a model, with one structure for all models of equal structure."""
    leaves, tree = jax.tree.flatten(model)
    return Flat(_structures.setdefault(tree, Structure(tree)), leaves)


def decode(
    model: Flat,
    rows: Rows,
    sampling: Sampling,
    stops: Int[Array, "n l"] | Int[np.ndarray, "n l"] | None,
    key: Key[Array, ""],
    start: Any,
    steps: Any,
    *,
    size: int,
) -> tuple[Rows, Generation]:
    """Returns the rows after up to `steps` steps, and room for `size` new tokens with theirs.

    Args:
      start: number of new tokens before this call.
    """
    run = _compiled(options())
    return run(model.structure, model.leaves, rows, sampling, stops, key, start, steps, size=size)


def options() -> tuple[tuple[str, str], ...]:
    """Returns the options with which the loop of `decode` is compiled on the default device."""
    return GPU_OPTIONS if jax.default_backend() == "gpu" else ()


@functools.cache
def _compiled(options: tuple[tuple[str, str], ...]) -> Any:
    arguments = dict(static_argnums=(0,), static_argnames=("size",), donate_argnums=(2,))
    return jax.jit(_decode, **arguments, compiler_options=dict(options) or None)


def _decode(structure, leaves, rows, sampling, stops, key, start, steps, *, size):
    model = jax.tree.unflatten(structure.tree, leaves)
    keys, stack = keys_of_rows(key, rows.token.shape[0]), model.config.stack

    def step(carry):
        rows, new = carry
        logits, state = model(rows.token[:, None], whole(stack, rows.state))
        rows = rows._replace(state=lean(stack, state))
        rows, new = append(rows, new, logits[:, 0], sampling, stops, keys, start, ~rows.stopped)
        return rows, new._replace(calls=new.calls + 1)

    def goes_on(carry):
        rows, new = carry
        return (new.calls < steps) & ~rows.stopped.all()

    rows = rows._replace(state=lean(stack, rows.state))
    rows, new = jax.lax.while_loop(goes_on, step, (rows, empty(len(rows.token), size)))
    return rows._replace(state=whole(stack, rows.state)), new


def append(
    rows: Rows,
    new: Generation,
    logits: Float[Array, "b v"],
    sampling: Sampling,
    stops: Int[Array, "n l"] | None,
    keys: Key[Array, "b"],
    start: Any,
    wanted: Bool[Array, "b"],
    *,
    choose: Callable[..., Any] = choose,
) -> tuple[Rows, Generation]:
    """Returns the rows and their new tokens with one more token in each row that is `wanted`; others stay as they are.

    Args:
      logits: what the tokens are chosen from.
      keys: see `keys_of_rows`.
      start: number of new tokens of each row before those of `new`.
      choose: takes and returns what `sampling.choose` does.
    """
    here = jax.vmap(jax.random.fold_in)(keys, start + new.lengths)
    token, chance = choose(logits, sampling, here, rows.seen)
    row = jnp.arange(len(token))
    # What no row wants goes to a place that does not exist.
    place = jnp.where(wanted, new.lengths, new.tokens.shape[1])
    new = new._replace(
        tokens=new.tokens.at[row, place].set(token, mode="drop"),
        lengths=new.lengths + wanted,
        log_probabilities=new.log_probabilities.at[row, place].set(chance, mode="drop"),
    )
    recent, seen, stopped = rows.recent, rows.seen, rows.stopped
    if stops is not None:
        recent = jnp.where(wanted[:, None], jnp.concatenate([recent[:, 1:], token[:, None]], axis=1), recent)
        fits = (recent[:, None] == stops[None]) | (stops == ANY)[None]
        stopped = stopped | fits.all(-1).any(-1)
    if seen is not None:
        seen = seen.at[row, token].max(wanted)
    return Rows(rows.state, jnp.where(wanted, token, rows.token), stopped, recent, seen), new
