"""The primitives and methods of the study `parallel`, each with the published formula of what it sends and computes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention import attention
from layers.kernels.delta_rule import delta_rule
from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.long_conv import long_conv
from layers.kernels.short_conv import short_conv

TAPS = 4  # of the short convolution
SUM = 4  # bytes of a number in a sum or a state
CHUNK = 64  # tokens over which a chunked recurrence multiplies with each other


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a layer: rows, tokens in all, heads of queries and of keys, features of a head, bytes of a number."""

    batch: int
    time: int
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def width(self) -> int:
        """Channels of a recurrence or a convolution."""
        return self.heads * self.head_dim


class Cost(NamedTuple):
    """What one pass takes of a device: bytes that it sends, messages one after the other, FLOPs of the busiest."""

    bytes: float
    messages: float
    flops: float


class Method(NamedTuple):
    """A primitive by one method.

    Attributes:
      primitive, name: of both.
      draw: gives the arrays of a call, by name.
      call: the call on these arrays.
      cost: the published formula, forward and both passes, for sizes and a number of devices.
      overlaps: whether what it sends is independent of what it computes meanwhile.
      attention, states: the methods in force.
    """

    primitive: str
    name: str
    draw: Callable[[Sizes], dict[str, tuple[int, ...]]]
    call: Callable[..., jax.Array]
    cost: Callable[[Sizes, int], tuple[Cost, Cost]]
    overlaps: bool
    attention: str = "all_gather"
    states: str = "all_gather"


def _heads(s: Sizes) -> dict[str, tuple[int, ...]]:
    keys = (s.batch, s.time, s.kv_heads, s.head_dim)
    return {"q": (s.batch, s.time, s.heads, s.head_dim), "k": keys, "v": keys}


def _linear_heads(s: Sizes) -> dict[str, tuple[int, ...]]:
    heads = (s.batch, s.time, s.heads, s.head_dim)
    return dict.fromkeys("qkv", heads) | {"log_decay": heads[:3]}


def _attention_cost(method: str, s: Sizes, parts: int) -> tuple[Cost, Cost]:
    """Backward costs 2.5 times the FLOPs, five products of logits for two; a ring of scores computes what is hidden too."""
    tokens = s.batch * s.time / parts
    queries, keys = tokens * s.heads * s.head_dim, 2 * tokens * s.kv_heads * s.head_dim
    hops = parts - 1
    half = 2 * s.batch * s.heads * s.head_dim * s.time**2 / parts  # causal: half of both products
    # In contiguous order the queries of the last device see all keys but half of its own.
    flops = half * (2 - 1 / parts if method in ("all_gather", "ring", "score_ring") else 1)
    first = 2 * half if method == "score_ring" else flops
    # Zig-zag order exchanges queries, keys, values and outputs, and back their gradients.
    order = (queries + keys) * s.item + queries * SUM, queries * s.item + keys * s.item + queries * SUM
    if method == "all_gather":
        forward, backward = hops * keys * s.item, hops * keys * s.item
        messages = hops, hops
    elif method == "ulysses":
        repeats = math.lcm(s.kv_heads, parts) / s.kv_heads
        forward = backward = hops / parts * (2 * queries + repeats * keys) * s.item
        messages = 4 * hops, 4 * hops
    elif method == "balanced_ring":
        rounds, helping, rows = parts // 2, hops // 2, tokens * s.heads * SUM
        flops = first = half * (1 + 2 * rounds) / parts
        results = queries * SUM + 2 * rows
        forward = rounds * keys * s.item + helping * (queries * s.item + results)
        backward = rounds * keys * (s.item + SUM) + helping * (queries * (2 * s.item + SUM) + 3 * rows)
        messages = 2 * rounds, 2 * rounds
    elif method in ("ring", "zigzag", "score_ring"):
        forward, backward = hops * keys * s.item, hops * keys * s.item + parts * keys * SUM
        messages = hops * (1 + (method == "score_ring")), parts
    else:
        rows = tokens * s.heads * SUM
        forward = hops * (queries * s.item + queries * SUM + 2 * rows)
        backward = hops * (2 * queries * s.item + 3 * rows + queries * SUM)
        messages = hops, hops
    if method in ("zigzag", "token_ring"):
        forward, backward = forward + order[0], backward + order[1]
        messages = messages[0] + 4, messages[1] + 4
    both = Cost(forward + backward, messages[0] + messages[1], first + 2.5 * flops)
    return Cost(forward, messages[0], first), both


def _state_cost(
    transition: int, states: str, flops: Callable[[Sizes], float], s: Sizes, parts: int
) -> tuple[Cost, Cost]:
    """A state (k, v) and a transition of as many numbers as `transition` per head; tokens are read twice, or values are twice as wide."""
    state = s.batch * s.heads * s.head_dim * s.head_dim * SUM
    if states == "all_gather":
        sent = (parts - 1) * (state + s.batch * s.heads * transition * SUM)
        messages = parts - 1
    else:
        blocks = _blocks(s.head_dim, parts)
        messages = blocks + parts - 2
        sent = messages / blocks * state
    work = 2 * flops(s) * s.batch * s.time / parts
    return Cost(sent, messages, work), Cost(2 * sent, 2 * messages, 3 * work)


def _blocks(size: int, parts: int) -> int:
    """The blocks that `layers.kernels.all_scan` cuts a state into."""
    return max(n for n in range(1, min(parts, size) + 1) if size % n == 0)


def _linear_flops(s: Sizes) -> float:
    return s.heads * (4 * s.head_dim**2 + 4 * CHUNK * s.head_dim)


def _delta_flops(s: Sizes) -> float:
    return s.heads * (6 * s.head_dim**2 + 8 * CHUNK * s.head_dim)


def _recurrence_cost(s: Sizes, parts: int) -> tuple[Cost, Cost]:
    sent, work = (parts - 1) * 2 * s.batch * s.width * SUM, 4 * s.batch * s.time * s.width / parts
    return Cost(sent, parts - 1, work), Cost(2 * sent, 2 * (parts - 1), 3 * work)


def _halo_cost(s: Sizes, parts: int) -> tuple[Cost, Cost]:
    sent = s.batch * (TAPS - 1) * s.width * SUM
    work = 2 * TAPS * s.batch * s.time * s.width / parts
    return Cost(sent, 1, work), Cost(2 * sent, 2, 3 * work)


def _exchange_cost(s: Sizes, parts: int) -> tuple[Cost, Cost]:
    sent = 2 * (parts - 1) / parts * s.batch * s.time / parts * s.width * s.item
    work = (
        30 * s.batch * s.time * s.width * math.log2(2 * s.time) / parts
    )  # three transforms of twice the length
    return Cost(sent, 2 * (parts - 1), work), Cost(2 * sent, 4 * (parts - 1), 3 * work)


def _methods() -> Iterator[Method]:
    causal = functools.partial(attention, causal=True)
    for name in ("all_gather", "ulysses", "ring", "zigzag", "balanced_ring", "token_ring", "score_ring"):
        cost = functools.partial(_attention_cost, name)
        overlaps = name not in ("all_gather", "ulysses")
        yield Method("attention", name, _heads, causal, cost, overlaps, attention=name)
    for states in ("all_gather", "all_scan"):
        for primitive, call, draw, transition, flops in (
            ("gated_linear_attention", _linear, _linear_heads, 1, _linear_flops),
            (
                "delta_rule",
                _delta,
                lambda s: _linear_heads(s) | {"beta": (s.batch, s.time, s.heads)},
                None,
                _delta_flops,
            ),
        ):
            cost = functools.partial(_dense_or, transition, states, flops)
            yield Method(primitive, states, draw, call, cost, False, states=states)

    def channels(s):
        return (s.batch, s.time, s.width)

    yield Method(
        "linear_recurrence",
        "all_gather",
        lambda s: {"log_a": channels(s), "x": channels(s)},
        lambda log_a, x: linear_recurrence(jnp.exp(-jnp.abs(log_a)), x)[0],
        _recurrence_cost,
        False,
    )
    yield Method(
        "short_conv",
        "halo",
        lambda s: {"x": channels(s), "weight": (TAPS, s.width)},
        lambda x, weight: short_conv(x, weight)[0],
        _halo_cost,
        False,
    )
    yield Method(
        "long_conv",
        "exchange",
        lambda s: {"x": channels(s), "kernel": (s.width, s.time)},
        lambda x, kernel: long_conv(x, kernel)[0],
        _exchange_cost,
        False,
    )


def _dense_or(transition, states, flops, s, parts):
    return _state_cost(transition or s.head_dim**2, states, flops, s, parts)


def _linear(q, k, v, log_decay):
    return gated_linear_attention(q, k, v, log_decay=-jnp.abs(log_decay))[0]


def _delta(q, k, v, log_decay, beta):
    options = {"log_decay": -jnp.abs(log_decay), "normalize_qk": True}
    return delta_rule(q, k, v, jax.nn.sigmoid(beta), **options)[0]


METHODS = tuple(_methods())


def chosen(only: Sequence[str]) -> list[Method]:
    """Returns the methods with these names, `primitive` or `primitive/method`; all if there are none.

    Raises:
      ValueError: an unknown name.
    """
    names = {f"{m.primitive}/{m.name}": m for m in METHODS}
    for name in only:
        if name not in names and name not in {m.primitive for m in METHODS}:
            raise ValueError(
                f"only={name!r} is no method; expected primitives or methods among {', '.join(names)}"
            )
    return [m for name, m in names.items() if not only or name in only or m.primitive in only]
