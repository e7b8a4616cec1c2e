"""A model as pure functions: initialization from a key, and the output on a batch from parameters and statistics.

Parameters and statistics are dicts of arrays by the path of their variable in the model, "stack/stacked/0/mixer/b".
`Declaration`s hold what a model declares of them, and their names by layer.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from layers.adapters import GROUP as LORA
from layers.kernels.segments import Padding
from layers.mixer import Mixer
from layers.parameters import AuxiliaryLoss, Axes, Constant, axes_of, group_of, rate_of
from layers.reduction.kept import placed
from layers.segments import Segments
from layers.typing import Array
from seqmodels.dual_encoder import as_rows
from seqmodels.encoder_decoder import EncoderDecoder, of_pairs
from seqmodels.language_model import LanguageModel
from seqmodels.names import Names, join_layers, names_of, split_layers
from seqmodels.pointer_network import PointerNetwork
from seqmodels.replaced_token_detector import ReplacedTokenDetector

Arrays = dict[str, Array]
STATISTICS = (nnx.BatchStat, Constant, AuxiliaryLoss)
STORED = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Declaration:
    """The declaration of a variable of a model, or of several that form one vector.

    Attributes:
      shape, dtype: shape and dtype of the array; layers of a stacked one are the leading axis.
      group: group of the optimizer.
      axes: logical axes (see `layers.parameters`).
      names: names by layer.
      members: declarations of the parts of a vector by path.
      rate: factor on the learning rate of the group.
    """

    shape: tuple[int, ...]
    dtype: Any
    group: str
    axes: Axes
    names: Names
    members: Mapping[str, "Declaration"] = dataclasses.field(default_factory=dict)
    rate: float = 1.0

    @classmethod
    def of_vector(cls, members: Mapping[str, "Declaration"]) -> "Declaration":
        """Returns the declaration of a vector of concatenated arrays of one group and dtype."""
        first = next(iter(members.values()))
        size = sum(member.size for member in members.values())
        return cls((size,), first.dtype, first.group, (None,), Names((), False), members)

    @property
    def size(self) -> int:
        """Number of elements of the array."""
        return math.prod(self.shape)

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether the array is a matrix, or a stack of matrices, between hidden features: neither embedding nor output."""
        if self.members:
            return False
        rank = len(self.shape) - self.names.stacked
        return rank == 2 and self.group == "default" and "vocab" not in self.axes

    def split(self, array: Array) -> dict[str, Array]:
        """Returns the array by the names of its layers."""
        if not self.members:
            return split_layers(self.names, array)
        parts, start = {}, 0
        for member in self.members.values():
            parts |= member.split(array[start : start + member.size].reshape(member.shape))
            start += member.size
        return parts

    def join(self, arrays: Mapping[str, Array]) -> Array:
        """Returns the array whose parts are given; the inverse of `split`."""
        if not self.members:
            return join_layers(self.names, arrays)
        return jnp.concatenate([jnp.ravel(member.join(arrays)) for member in self.members.values()])


class SplitModel:
    """A model split into declarations and pure functions, without any array.

    Attributes:
      parameters: declarations of the parameters by path: of all, or of those of adapters if the model has any.
      frozen: paths of all other parameters, which are among the statistics.
      statistics: declarations of running statistics, constants, auxiliary losses and all else that gradients do not change.
      mixers: class and config of each mixer by its path.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        *,
        padding: Padding = "anywhere",
        packed: bool | int = True,
        unprojected: bool = False,
    ):
        """Traces `make`; nothing is allocated.

        Args:
          make: function that builds the model.
          padding, packed: static facts about the segment ids of batches; see `Segments`.
          unprojected: whether outputs are what logits are computed from, if the model is a language model; see `Task`.

        Raises:
          TypeError: if a parameter or statistic has a dtype that checkpoints do not support.
          ValueError: if the model has no parameter, or variables of other types.
        """
        self._make, self._padding, self._packed, self._unprojected = make, padding, packed, unprojected
        model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self._graph, parameters, statistics, rest = nnx.split(model, nnx.Param, STATISTICS, ...)
        if others := [f"{_path(p)} ({type(v).__name__})" for p, v in nnx.to_flat_state(rest)]:
            raise ValueError(
                f"the model holds {', '.join(others)}; a model may hold nnx.Param, nnx.BatchStat and the kinds of "
                "layers.parameters only, and constants as plain arrays or in its config"
            )
        declared = _declarations(parameters)
        if not declared:
            raise ValueError("the model has no parameters")
        self.parameters = {path: d for path, d in declared.items() if d.group == LORA} or declared
        self.frozen = tuple(path for path in declared if path not in self.parameters)
        self.statistics = _declarations(statistics) | {path: declared[path] for path in self.frozen}
        self.mixers = _mixers(model)
        self._auxiliary = tuple(
            _path(path) for path, v in nnx.to_flat_state(statistics) if isinstance(v, AuxiliaryLoss)
        )

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters that gradients change."""
        return sum(declaration.size for declaration in self.parameters.values())

    def describe(self) -> str:
        """Returns the numbers of parameters in words."""
        beside = sum(self.statistics[path].size for path in self.frozen)
        return f"{self.num_parameters:,} parameters" + (
            f" of adapters beside {beside:,} others" if beside else ""
        )

    def initialise(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        """Returns parameters and statistics before training; a pure function, to be run under `jax.jit`."""
        parameters, statistics = arrays_of(self._make(nnx.Rngs(key)))
        return parameters, statistics | {path: parameters.pop(path) for path in self.frozen}

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether a layer adds an auxiliary loss in training."""
        return bool(self._auxiliary)

    def auxiliary_loss(self, statistics: Mapping[str, Array]) -> Array:
        """Returns the sum of the layers' auxiliary losses, from the statistics after a call; 0 outside training."""
        return sum((statistics[path].sum() for path in self._auxiliary), jnp.zeros((), jnp.float32))

    def module(self, parameters: Mapping[str, Array], statistics: Mapping[str, Array]) -> nnx.Module:
        """Returns the model with these arrays."""
        frozen = {path: statistics[path] for path in self.frozen}
        others = {path: array for path, array in statistics.items() if path not in frozen}
        return nnx.merge(self._graph, _nested({**parameters, **frozen}), _nested(others))

    def __call__(
        self,
        parameters: Mapping[str, Array],
        statistics: Mapping[str, Array],
        batch: Mapping[str, Array],
        *,
        key: jax.Array | None,
    ) -> tuple[Array, Arrays]:
        """Returns the model's output on a batch and the statistics after it; a key means training."""
        # Losses of an earlier step must not be added again.
        zeros = {path: jnp.zeros_like(statistics[path]) for path in self._auxiliary}
        model = self.module(parameters, {**statistics, **zeros})
        ids = batch.get("segment_ids")
        if isinstance(model, EncoderDecoder | PointerNetwork):
            facts = dict(padding=self._padding, packed=self._packed)
            output = of_pairs(model, batch["inputs"], segment_ids=ids, key=key, **facts)
            return output, self._after(model, statistics)
        if ids is not None and ids.ndim == 3:
            ids = as_rows(ids)
        segments = Segments.of(
            ids, padding=self._padding, packed=self._packed, intervals=batch.get("intervals")
        )
        if "positions" in batch:
            segments = placed(segments, batch["positions"])
        call = model
        if self._unprojected and isinstance(model, LanguageModel):
            call = model.unprojected
        if isinstance(model, ReplacedTokenDetector):
            call = partial(model, labels=batch.get("labels"))
        output, _ = call(batch["inputs"], segment_ids=segments, key=key)
        return output, self._after(model, statistics)

    def _after(self, model: nnx.Module, statistics: Mapping[str, Array]) -> Arrays:
        """Returns the statistics after a call of the model."""
        new = nnx.to_flat_state(nnx.state(model, STATISTICS))
        frozen = {path: statistics[path] for path in self.frozen}
        return frozen | {_path(path): variable[...] for path, variable in new}


def arrays_of(model: nnx.Module) -> tuple[Arrays, Arrays]:
    """Returns the parameters and the statistics of a model by path."""
    _, *states = nnx.split(model, nnx.Param, STATISTICS)
    return tuple({_path(p): v[...] for p, v in nnx.to_flat_state(state)} for state in states)


def _mixers(model: nnx.Module) -> dict[str, tuple[type[Mixer], Any]]:
    return {_path(p): (type(m), m.config) for p, m in nnx.iter_modules(model) if isinstance(m, Mixer)}


def _path(path: tuple[str | int, ...]) -> str:
    return "/".join(map(str, path))


def _nested(arrays: Mapping[str, Array]) -> dict[Any, Any]:
    """Returns the arrays in the form that nnx.merge takes, with list indices as integers."""
    split = {
        tuple(int(part) if part.isdecimal() else part for part in path.split("/")): array
        for path, array in arrays.items()
    }
    return traverse_util.unflatten_dict(split)


def _declarations(state: nnx.State) -> dict[str, Declaration]:
    found = {}
    for path, variable in nnx.to_flat_state(state):
        array = variable.get_value()
        if str(array.dtype) not in STORED:
            raise TypeError(
                f"{_path(path)} is {array.dtype}; parameters and statistics are stored as {' or '.join(STORED)} "
                "(complex ones as their real and imaginary parts)"
            )
        axes = axes_of(variable) if isinstance(variable, nnx.Param) else (None,) * len(array.shape)
        found[_path(path)] = Declaration(
            tuple(array.shape),
            array.dtype,
            group_of(variable),
            axes,
            names_of(path, variable),
            rate=rate_of(variable),
        )
    return found
