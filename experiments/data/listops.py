"""ListOps of Long Range Arena (Nangia & Bowman 2018; Tay et al. 2021), generated from a seed.

A sequence is a nested expression such as `[MAX 4 [MIN 2 3 ] 9 ]`; its label is the value, one digit.
A tree is drawn from the root at depth 1. A node above `max_depth` is a digit with probability 3/4 and an operator
with 2 to `max_args` arguments otherwise; a node at `max_depth` is a digit. Arities, operators (MIN, MAX, MED, SM) and
digits are uniform. A tree is kept if min_length < tokens < max_length, both strict, and if no earlier tree equals it.
MED is the median, the mean of the two middle values truncated; SM is the sum modulo 10.

Two things make this fast without changing that distribution. Length depends only on the arities, so symbols are drawn
only for trees that are kept. Since every node is at least one token, a tree is abandoned as soon as its open nodes reach
`max_length`.

This module needs only the standard library, and draws only from `random.Random(seed).random()`, the one stream that
Python guarantees to keep: the same configuration gives the same sequences on every version and machine.
"""

import dataclasses
import difflib
import hashlib
import itertools
import multiprocessing
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

from experiments.data.work import available_cores, worker_died

VERSION = 1  # increment when the sequences of a configuration change
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
VOCABULARY = ("<pad>", *"0123456789", *OPERATORS, "]")
TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}
FIRST_DIGIT = TOKEN_IDS["0"]
FIRST_OPERATOR = TOKEN_IDS["[MIN"]
CLOSE = TOKEN_IDS["]"]
NUM_CLASSES = 10
SPLITS = ("train", "validation", "test")

DIGIT_ABOVE = 0.25  # a uniform draw above this makes a node a digit
BLOCK_DRAWS = 4096  # number of trees drawn from one seed, the unit of parallel work
PATIENCE_BLOCKS = 64
LEAST_YIELD = 1e-4  # new sequences per draw, over PATIENCE_BLOCKS, below which generation fails

Record = tuple[bytes, int]


@dataclasses.dataclass(frozen=True)
class ListOpsConfig:
    """The grammar, the window of lengths (strict, in tokens), the number of sequences per split, and the seed.

    Raises:
      TypeError: if a field is not an integer.
      ValueError: if a field is out of range or no tree can fall inside the window.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000
    train: int = 96_000
    validation: int = 2_000
    test: int = 2_000
    seed: int = 0

    def __post_init__(self):
        least = dict(
            max_depth=1, max_args=2, min_length=0, max_length=2, train=1, validation=1, test=1, seed=0
        )
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.max_length - self.min_length < 2:
            raise ValueError(
                f"no length is strictly between min_length={self.min_length} and max_length={self.max_length}; "
                f"raise max_length to {self.min_length + 2} or more"
            )
        longest = 1
        for _ in range(1, self.max_depth):
            longest = 2 + self.max_args * longest
            if longest > self.min_length:
                break
        if longest <= self.min_length:
            raise ValueError(
                f"min_length={self.min_length} cannot be passed: the longest tree of max_depth={self.max_depth} and "
                f"max_args={self.max_args} has {longest} tokens"
            )

    @property
    def total(self) -> int:
        return self.train + self.validation + self.test


PRESETS = {
    "full": ListOpsConfig(),
    "short": ListOpsConfig(max_depth=6, max_args=5, min_length=20, max_length=200, train=48_000),
}


def preset_config(preset: str = "full", **overrides: int) -> ListOpsConfig:
    """Returns the configuration named `preset` ("full" is Long Range Arena's, "short" is for a CPU), with overrides."""
    if preset not in PRESETS:
        close = difflib.get_close_matches(str(preset), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown ListOps preset {preset!r}: choose from {', '.join(PRESETS)}{hint}")
    return dataclasses.replace(PRESETS[preset], **overrides)


def encode(text: str) -> bytes:
    """Returns the token ids, one byte each, of an expression whose tokens are separated by spaces.

    Raises:
      ValueError: if a token is not in `VOCABULARY`.
    """
    try:
        return bytes(map(TOKEN_IDS.__getitem__, text.split()))
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is not a ListOps token: {' '.join(VOCABULARY[1:])}") from None


def decode(tokens: Sequence[int]) -> str:
    """Returns the expression of token ids, without padding."""
    return " ".join(VOCABULARY[token] for token in tokens if token)


def apply_operator(operator: int, values: Sequence[int]) -> int:
    """Returns the digit that the operator with this token id computes from its arguments."""
    name = VOCABULARY[operator]
    if name == "[MIN":
        return min(values)
    if name == "[MAX":
        return max(values)
    if name == "[SM":
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def evaluate(tokens: Sequence[int]) -> int:
    """Returns the value of one expression given as token ids.

    Raises:
      ValueError: if the ids are not exactly one complete expression.
    """
    frames: list[tuple[int, list[int]]] = [(0, [])]
    for position, token in enumerate(tokens):
        if FIRST_DIGIT <= token < FIRST_OPERATOR:
            frames[-1][1].append(token - FIRST_DIGIT)
        elif FIRST_OPERATOR <= token < CLOSE:
            frames.append((token, []))
        elif token == CLOSE and len(frames) > 1 and frames[-1][1]:
            operator, values = frames.pop()
            frames[-1][1].append(apply_operator(operator, values))
        else:
            raise ValueError(f"token {position} of the expression, id {token}, cannot stand there")
    if len(frames) > 1 or len(frames[0][1]) != 1:
        raise ValueError(f"{len(tokens)} tokens are not one complete expression")
    return frames[0][1][0]


def generate(
    config: ListOpsConfig, *, workers: int | None = None, report: Callable[[int], object] | None = None
) -> dict[str, list[Record]]:
    """Returns the whole data set: split -> records (token ids as bytes, label), with all sequences distinct.

    The result depends only on `config`. Each block of `BLOCK_DRAWS` trees has its own seed. Blocks are consumed in order,
    duplicates over all blocks are dropped, and the splits are cut in sequence.

    Args:
      workers: number of processes; None takes every available core, or one for a small data set. With more than
        one, a script that calls this at its top level must do so under `if __name__ == "__main__":`.
      report: function called with the number of sequences added, block by block.

    Raises:
      ValueError: if `workers` is below one, or the grammar rarely yields a new sequence inside the window.
      RuntimeError: if a worker process dies.
    """
    if workers is None:
        workers = _default_workers(config)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    found: dict[bytes, int] = {}
    yields: deque[int] = deque(maxlen=PATIENCE_BLOCKS)
    with _open_blocks(config, workers) as blocks:
        for block in blocks:
            before = len(found)
            for tokens, label in block:
                found.setdefault(tokens, label)
            yields.append(len(found) - before)
            if report is not None:
                report(min(len(found), config.total) - before)
            if len(found) >= config.total:
                break
            if len(yields) == PATIENCE_BLOCKS and sum(yields) < LEAST_YIELD * PATIENCE_BLOCKS * BLOCK_DRAWS:
                raise ValueError(
                    f"only {len(found)} of {config.total} distinct sequences found, and the last "
                    f"{PATIENCE_BLOCKS * BLOCK_DRAWS} trees gave {sum(yields)}: this grammar hardly ever gives a new "
                    f"sequence of more than {config.min_length} and fewer than {config.max_length} tokens; widen the "
                    "window, raise max_depth or max_args, or ask for fewer sequences"
                )
    records = iter(found.items())
    return {split: list(itertools.islice(records, getattr(config, split))) for split in SPLITS}


def _default_workers(config: ListOpsConfig) -> int:
    if config.total * config.max_length < 10_000_000:
        return 1  # starting processes takes longer
    return available_cores()


@contextmanager
def _open_blocks(config: ListOpsConfig, workers: int) -> Iterator[Iterator[list[Record]]]:
    if workers == 1:
        yield (draw_block(config, block) for block in itertools.count())
        return
    # Spawned, not forked: a fork of a process with JAX's threads can deadlock. Each worker has its own pipe, whose other
    # end only that worker holds: if it dies within a block, reading ends instead of waiting.
    context = multiprocessing.get_context("spawn")
    processes, receivers = [], []
    try:
        for first in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            receivers.append(receiver)
            with sender:
                process = context.Process(
                    target=_send_blocks, args=(config, sender, first, workers), daemon=True
                )
                process.start()
            processes.append(process)
        yield _receive_blocks(receivers)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for receiver in receivers:
            receiver.close()


def _receive_blocks(receivers: Sequence[Connection]) -> Iterator[list[Record]]:
    for receiver in itertools.cycle(receivers):
        try:
            records = receiver.recv()
        except (EOFError, OSError) as error:
            raise worker_died("ListOps") from error
        yield records


def _send_blocks(config: ListOpsConfig, sender: Connection, first: int, step: int) -> None:
    """Sends every `step`-th block from one process; each is drawn while the previous one waits to be read."""
    for block in itertools.count(first, step):
        sender.send(draw_block(config, block))


def draw_block(config: ListOpsConfig, block: int) -> list[Record]:
    """Returns the records among `BLOCK_DRAWS` trees drawn from the seed of this block, with duplicates."""
    digest = hashlib.sha256(f"listops {config.seed} {block}".encode()).digest()
    uniform = random.Random(int.from_bytes(digest[:8], "little")).random
    records = []
    for _ in range(BLOCK_DRAWS):
        arities = _draw_arities(uniform, config.max_depth, config.max_args, config.max_length)
        if arities is not None and _length(arities) > config.min_length:
            records.append(_draw_symbols(uniform, arities))
    return records


def _length(arities: list[int]) -> int:
    return 2 * len(arities) - arities.count(
        0
    )  # a digit is one token, an operator two: itself and its bracket


def _draw_arities(
    uniform: Callable[[], float], max_depth: int, max_args: int, max_length: int
) -> list[int] | None:
    """Returns the number of arguments per node of a tree, depth first (0 is a digit); None at `max_length` tokens."""
    if max_depth == 1:
        return [0]
    choices = max_args - 1
    arities: list[int] = []
    waiting = [1]  # number of nodes still to draw per open level; its length is the depth
    length = 1  # length if all nodes still to draw are digits
    while waiting:
        if not waiting[-1]:
            waiting.pop()
            continue
        waiting[-1] -= 1
        if uniform() > DIGIT_ABOVE:
            arities.append(0)
            continue
        arity = 2 + int(uniform() * choices)
        length += 1 + arity
        if length >= max_length:
            return None
        arities.append(arity)
        if len(waiting) + 1 < max_depth:
            waiting.append(arity)
        else:
            arities.extend([0] * arity)
    return arities


def _draw_symbols(uniform: Callable[[], float], arities: list[int]) -> Record:
    """Returns a record with the operators and digits drawn for a tree of this shape, and its value."""
    tokens = bytearray()
    value = 0
    frames: list[tuple[int, int, list[int]]] = []
    for arity in arities:
        if arity:
            operator = FIRST_OPERATOR + int(uniform() * len(OPERATORS))
            tokens.append(operator)
            frames.append((operator, arity, []))
            continue
        value = int(uniform() * 10)
        tokens.append(FIRST_DIGIT + value)
        while frames:
            operator, arguments, values = frames[-1]
            values.append(value)
            if len(values) < arguments:
                break
            value = apply_operator(operator, values)
            tokens.append(CLOSE)
            frames.pop()
    return bytes(tokens), value
