"""What a family of published models is: its configs read and written, and its tensors by pairs of names."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from seqmodels.config import EncoderDecoderConfig, ModelConfig, StackConfig
from seqmodels.interop.options import Options

Arrays = tuple[np.ndarray, ...]
BLOCK = "stack/blocks"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Tensors of theirs and the variables of ours that hold the same numbers.

    Attributes:
      theirs, ours: names, within a layer or in full.
      load: function from their arrays to ours.
      save: its inverse.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[..., Arrays]
    save: Callable[..., Arrays]

    def within(self, theirs: str, ours: str) -> "Pair":
        """Returns the pair with prefixes before its names."""
        names = tuple(theirs + name for name in self.theirs), tuple(f"{ours}/{name}" for name in self.ours)
        return dataclasses.replace(self, theirs=names[0], ours=names[1])


Pairs = tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published models.

    Attributes:
      architecture: the name in "architectures" of their config.json.
      model_type: the name in "model_type".
      read: function from their options to a config of ours for `seqmodels.build_model`.
      write: function from a model of ours to their options, as far as they exist; `save_pretrained` checks with `read` that
        nothing of the model is lost.
      outer: pairs outside of layers.
      layer: prefix of their names within a layer, with "{}" for its number.
      parts: function from the config of the stack to pairs within a layer, by the names of its mixer and channel mixer; ""
        holds for all layers. Pairs for variables that a model lacks, such as biases, stand for nothing.
      constants: variables within a layer that have one value in every model of the family and no tensor.
      more: function from the config of the stack to further pairs, with full names, where they depend on it.
      unread: pattern of names of tensors that hold nothing to read, such as masks.
      base: prefix of all names but the head's, which some checkpoints leave out.
      aliases: patterns of other names that some checkpoints have, and what to put in their place.
      alternating: whether gates and inputs of stacked experts take turns in transformers; one follows the other otherwise.
      joined: function from the config of the stack to patterns of names of tensors that some checkpoints have in place of several,
        each with what to put in its place for each of these and how many rows that one has. They are never written.
      sides: function from the config of an encoder-decoder to the pairs of the layers of both sides, with full names; `layer` and
        `parts` then name nothing.
      numbers: function from the config of the stack to the numbers of their layers that hold the mixer and the channel mixer of
        each layer of ours; by default both are the number of ours.
    """

    architecture: str
    model_type: str
    read: Callable[[Options], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    outer: Pairs
    layer: str
    parts: Callable[[StackConfig], Mapping[str, Pairs]]
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
    more: Callable[[StackConfig], Pairs] = lambda _: ()
    unread: str = r"(?!)"
    base: str = "model."
    aliases: Sequence[tuple[str, str]] = ()
    alternating: bool = False
    sides: Callable[[EncoderDecoderConfig], Pairs] | None = None
    joined: Callable[[StackConfig], Mapping[str, Mapping[str, int]]] = lambda _: {}
    numbers: Callable[[StackConfig], Sequence[tuple[int, int]]] = lambda stack: [
        (layer, layer) for layer in range(stack.depth)
    ]

    def pairs(self, config: ModelConfig) -> Pairs:
        """Returns all pairs of a model, with full names."""
        if self.sides is not None:
            return *self.outer, *self.sides(config)
        stack = config.stack
        found, parts = [*self.outer, *self.more(stack)], self.parts(stack)
        for layer, (mixer_number, channel_number) in enumerate(self.numbers(stack)):
            channel = stack.channel_of(layer)
            kinds = [("", mixer_number), (stack.mixer_of(layer)[0], mixer_number)]
            kinds += [] if channel is None else [(channel[0], channel_number)]
            for kind, number in kinds:
                found += (
                    pair.within(self.layer.format(number), f"{BLOCK}/{layer}") for pair in parts.get(kind, ())
                )
        return tuple(found)

    def known_as(self, name: str) -> str:
        """Returns the name in the pairs of a tensor that may have another one."""
        for pattern, known in self.aliases:
            name = re.sub(pattern, known, name)
        return name

    def experts(self, whole: str, stack: StackConfig) -> str | None:
        """Returns where the arrays of experts of ours are that a module of theirs holds; None if it is in no layer."""
        for layer, (_, number) in enumerate(self.numbers(stack)):
            if whole.startswith(self.layer.format(number)) and whole.endswith(".experts"):
                return f"{BLOCK}/{layer}/channel"
        return None

    def constant(self, name: str) -> float | None:
        """Returns the value of a variable that has no tensor; None if it has one."""
        within = re.sub(rf"^{BLOCK}/\d+/", "", name)
        return self.constants.get(within)


def same(theirs: str, ours: str) -> Pair:
    """Returns a pair of equal arrays."""
    return Pair((theirs,), (ours,), lambda x: (x,), lambda x: (x,))


def transposed(theirs: str, ours: str) -> Pair:
    """Returns a pair of matrices, each the other's transpose."""
    return Pair((theirs,), (ours,), lambda x: (x.T,), lambda x: (x.T,))


def moved(pairs: Pairs, before: str, after: str) -> Pairs:
    """Returns pairs in which our names begin with another prefix."""

    def name(ours: str) -> str:
        return after + ours.removeprefix(before)

    return tuple(dataclasses.replace(pair, ours=tuple(map(name, pair.ours))) for pair in pairs)


def linear(theirs: str, ours: str) -> Pairs:
    """Returns the pairs of a linear map and its bias."""
    return transposed(f"{theirs}.weight", f"{ours}/kernel"), same(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str) -> Pairs:
    """Returns the pairs of a norm's scale and bias."""
    return same(f"{theirs}.weight", f"{ours}/scale"), same(f"{theirs}.bias", f"{ours}/bias")


def convolution(theirs: str, ours: str) -> Pairs:
    """Returns the pairs of a depthwise convolution, (d, 1, w) with them and (w, d) with us, and its bias."""
    weight = Pair(
        (f"{theirs}.weight",), (f"{ours}/weight",), lambda x: (x[:, 0].T,), lambda x: (x.T[:, None],)
    )
    return weight, same(f"{theirs}.bias", f"{ours}/bias")


def fused(theirs: str, ours: tuple[str, ...], orders: Callable[[int], list[np.ndarray]]) -> Pairs:
    """Returns the pairs of a linear map of theirs whose outputs are those of several of ours, and of its bias.

    Args:
      orders: function from the number of their outputs to the indices of the outputs of each of ours, all of them once.
    """

    def load(x):
        return tuple(x[index].T for index in orders(len(x)))

    def save(*parts):
        count = sum(part.shape[-1] for part in parts)
        whole = np.empty((count, *parts[0].shape[:-1]), parts[0].dtype)
        for index, part in zip(orders(count), parts, strict=True):
            whole[index] = part.T
        return (whole,)

    return tuple(
        Pair((f"{theirs}.{kind}",), tuple(f"{name}/{own}" for name in ours), load, save)
        for kind, own in (("weight", "kernel"), ("bias", "bias"))
    )


def merged(theirs: tuple[str, ...], ours: str, sizes: tuple[int, ...]) -> Pair:
    """Returns the pair of several linear maps of theirs and one of ours that gives their outputs one after another.

    Args:
      sizes: numbers of outputs of theirs.
    """
    ends = np.cumsum(sizes)[:-1]
    return Pair(
        tuple(f"{name}.weight" for name in theirs),
        (f"{ours}/kernel",),
        lambda *x: (np.concatenate(x).T,),
        lambda x: tuple(part.T for part in np.split(x, ends, axis=-1)),
    )


def merged_convolution(theirs: tuple[str, ...], ours: str, sizes: tuple[int, ...]) -> Pair:
    """Returns the pair of several depthwise convolutions of theirs and one of ours over all their channels."""
    ends = np.cumsum(sizes)[:-1]
    return Pair(
        tuple(f"{name}.weight" for name in theirs),
        (f"{ours}/weight",),
        lambda *x: (np.concatenate([each[:, 0].T for each in x], axis=-1),),
        lambda x: tuple(part.T[:, None] for part in np.split(x, ends, axis=-1)),
    )


def reshaped(theirs: str, ours: str, shape: tuple[int, ...], own: tuple[int, ...]) -> Pair:
    """Returns the pair of equal numbers in another shape: `shape` with them and `own` with us."""
    return Pair((theirs,), (ours,), lambda x: (x.reshape(own),), lambda x: (x.reshape(shape),))


def stacked(theirs: tuple[str, ...], ours: str, *, transpose: bool = False) -> Pair:
    """Returns the pair of several arrays of theirs, transposed if so said, and one of ours that stacks them."""

    def turned(x):
        return np.swapaxes(x, -1, -2) if transpose else x

    return Pair(theirs, (ours,), lambda *x: (turned(np.stack(x)),), lambda x: tuple(map(turned, x)))
