"""The training state as a tree of global arrays, and the form in which checkpoints store it.

On the devices, arrays are named by their variable in the model; a stacked array holds several layers. A checkpoint names
each array by its layer, so that it depends neither on how a stack holds its layers nor on the devices.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.parallel.mesh import Devices
from experiments.training.frozen import fingerprint
from experiments.training.model import Arrays, Declaration, SplitModel
from experiments.training.optimizers import Optimizer
from experiments.training.packing import Packing
from layers.typing import Array
from seqmodels.names import Names

# Separates this key from those that initialize the parameters, which derive from the same seed.
STEP_KEYS = 1
# What checkpoints hold of frozen parameters.
FINGERPRINT = "frozen/fingerprint"


class TrainState(NamedTuple):
    """The arrays that a training step reads and writes.

    Attributes:
      step: number of steps taken, int32.
      parameters: parameters by name, small ones packed into vectors (see `packing`).
      statistics: running statistics of norms and all else that gradients do not change, by name; with adapters also the
        parameters beside them, which checkpoints do not hold.
      optimizer: state of the optax chain.
      average: exponential moving average of the parameters, or None.
      key: data of the base key; step n draws from fold_in(key, n).
    """

    step: Array
    parameters: Arrays
    statistics: Arrays
    optimizer: Any
    average: Arrays | None
    key: Array

    @property
    def evaluated(self) -> Arrays:
        """The parameters that evaluation uses: the average if there is one."""
        return self.parameters if self.average is None else self.average


class StateLayout:
    """Creation, sharding and storage of the state of a model and its optimizer.

    Attributes:
      packing: packing of small parameters into vectors.
      transformation: transformation of the optimizer for the arrays of the state.
      abstract: shapes, dtypes and shardings of the state.
    """

    def __init__(
        self,
        model: SplitModel,
        optimizer: Optimizer,
        devices: Devices,
        frozen: Callable[[], Arrays] | None = None,
    ):
        """Traces the first state; nothing is allocated.

        Args:
          frozen: function that reads the parameters `model.frozen`, if there are any and states are read from checkpoints.
        """
        self._model, self._optimizer, self._devices, self._read_frozen = model, optimizer, devices, frozen
        self.packing = Packing(model.parameters, optimizer, devices)
        self.transformation = optimizer.transformation(self.packing.declarations)
        self._declared = {**model.statistics, **self.packing.declarations}
        abstract = jax.eval_shape(self.make, jax.random.key(0))
        shardings = devices.shardings(self._declared)

        def place(path, leaf):
            name = _part(path[-1])
            same = name in self._declared and self._declared[name].shape == leaf.shape
            sharding = shardings[name] if same else devices.replicated
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        self.abstract: TrainState = jax.tree.map_with_path(place, abstract)

    @functools.cached_property
    def shardings(self) -> TrainState:
        """The sharding of each array of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def initial(self, seed: int, given: tuple[Arrays, Arrays] | None = None) -> TrainState:
        """Returns the initial state. Neither the host nor any device holds a sharded array whole.

        Args:
          seed: seed of the parameters and of later draws.
          given: parameters and statistics to start from by their paths in the model; what they lack is as initialized.
        """
        make, shardings, frozen = self.make, self.shardings, {}
        if given is not None and self._model.frozen:
            # Passed beside the function, which would copy them.
            frozen = {name: given[1][name] for name in self._model.frozen}
            given = given[0], {name: array for name, array in given[1].items() if name not in frozen}
            make, shardings = lambda *args: self._thawed(self.make(*args)), self._thawed(self.shardings)
        run = jax.jit(lambda seed, given: make(jax.random.key(seed), given), out_shardings=shardings)
        with self._devices.active():
            return self._with_frozen(run(np.uint32(seed), given), frozen)

    def make(self, key: jax.Array, given: tuple[Arrays, Arrays] | None = None) -> TrainState:
        """Returns the initial state from the key of the seed, and from what is given (see `initial`). A pure function."""
        parameters, statistics = (
            drawn | each for drawn, each in zip(self._model.initialise(key), given or ({}, {}), strict=True)
        )
        parameters = self.packing.join(parameters)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            parameters=parameters,
            statistics=statistics,
            optimizer=self.transformation.init(parameters),
            average=None if self._optimizer.config.ema is None else jax.tree.map(jnp.copy, parameters),
            key=jax.random.key_data(jax.random.fold_in(key, STEP_KEYS)),
        )

    def to_stored(self, state: TrainState) -> dict[str, Array]:
        """Returns the state by the names of its layers, in new arrays, so that the state may be donated."""
        with self._devices.active():
            return self._split(state)

    def from_stored(self, stored: Mapping[str, Any], beside: TrainState | None = None) -> TrainState:
        """Returns the state, on the devices, from its stored form; the inverse of `to_stored`.

        Args:
          beside: a state whose frozen parameters the new one shares; they are read anew if None.

        Raises:
          ValueError: if names or shapes of arrays differ from those of the state, or the frozen parameters are others.
        """
        self.check_stored({name: tuple(array.shape) for name, array in stored.items()})
        arrays, frozen = dict(stored), {}
        if self._model.frozen:
            held = self._read_frozen() if beside is None else beside.statistics
            frozen = {name: held[name] for name in self._model.frozen}
            with self._devices.active():
                found = int(jax.jit(self._fingerprint)(frozen))
            if found != (expected := int(arrays.pop(FINGERPRINT))):
                raise ValueError(
                    f"the adapters of the checkpoint belong to other parameters: those of train.pretrained have the fingerprint "
                    f"{found:08x}, expected {expected:08x}; restore the published checkpoint that they were trained beside"
                )
        with self._devices.active():
            return self._with_frozen(self._join(arrays), frozen)

    def _thawed(self, state: TrainState) -> TrainState:
        """Returns the state without frozen parameters."""
        frozen = self._model.frozen
        return state._replace(statistics={n: a for n, a in state.statistics.items() if n not in frozen})

    def _with_frozen(self, state: TrainState, frozen: Arrays) -> TrainState:
        placed = {
            name: jax.device_put(array, self.shardings.statistics[name]) for name, array in frozen.items()
        }
        return state._replace(statistics=state.statistics | placed)

    def _fingerprint(self, frozen: Arrays) -> Array:
        return fingerprint({name: (self._model.statistics[name], array) for name, array in frozen.items()})

    @functools.cached_property
    def abstract_stored(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of what `to_stored` returns."""
        stored = jax.eval_shape(self._by_layer, self.abstract)
        shardings = self._stored_shardings
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in stored.items()
        }

    def check_stored(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless the shapes of a checkpoint, by name, are those of this state."""
        expected = {name: leaf.shape for name, leaf in self.abstract_stored.items()}
        problems = [f"{name} is missing" for name in expected if name not in shapes]
        problems += [f"{name} is not in the model" for name in shapes if name not in expected]
        problems += [
            f"{name} is {tuple(shapes[name])}, but {shape} in the model"
            for name, shape in expected.items()
            if name in shapes and tuple(shapes[name]) != shape
        ]
        if problems:
            more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems[:5])}{more}")

    @functools.cached_property
    def _split(self) -> Callable[[TrainState], dict[str, Array]]:
        return jax.jit(self._by_layer, out_shardings=self._stored_shardings)

    @functools.cached_property
    def _join(self) -> Callable[[dict[str, Array]], TrainState]:
        def join(stored):
            leaves = []
            for prefix, declaration, _ in self._leaves(self._thawed(self.abstract)):
                under = {
                    name.removeprefix(prefix): array
                    for name, array in stored.items()
                    if name.startswith(prefix)
                }
                leaves.append(declaration.join(under))
            return jax.tree.unflatten(jax.tree.structure(self._thawed(self.abstract)), leaves)

        return jax.jit(join, out_shardings=self._thawed(self.shardings))

    def _by_layer(self, state: TrainState) -> dict[str, Array]:
        stored: dict[str, Array] = {}
        for prefix, declaration, leaf in self._leaves(self._thawed(state)):
            parts = declaration.split(leaf)
            stored |= {f"{prefix}{name}": jnp.copy(array) for name, array in parts.items()}
        if self._model.frozen:
            stored[FINGERPRINT] = self._fingerprint({n: state.statistics[n] for n in self._model.frozen})
        return stored

    @functools.cached_property
    def _stored_shardings(self) -> dict[str, NamedSharding]:
        shardings = {}
        for prefix, declaration, leaf in self._leaves(self._thawed(self.abstract)):
            spec = leaf.sharding.spec
            spec = PartitionSpec(*spec[1:]) if declaration.names.stacked else spec
            sharding = (
                self._devices.replicated if declaration.members else NamedSharding(self._devices.mesh, spec)
            )
            shapes = jax.eval_shape(declaration.split, leaf)
            shardings |= {f"{prefix}{name}": sharding for name in shapes}
        return shardings | ({FINGERPRINT: self._devices.replicated} if self._model.frozen else {})

    def _leaves(self, state: Any) -> Iterator[tuple[str, Declaration, Any]]:
        """Yields each array of the state with the prefix and the declaration of its names in a checkpoint."""
        for path, leaf in jax.tree.leaves_with_path(state):
            declaration = self._declared.get(_part(path[-1]))
            *before, last = (_part(entry) for entry in path)
            prefix = "".join(f"{part}/" for part in before)
            # Arrays that are no variables, and the optimizer's placeholders for them, are stored under their own names.
            names = None if declaration is None else declaration.names
            if names is None or (names.stacked and leaf.shape[:1] != (len(names.names),)):
                declaration = Declaration(leaf.shape, leaf.dtype, "", (), Names((last,), False))
            yield prefix, declaration, leaf


def _part(entry: Any) -> str:
    """Returns an entry of a path as checkpoints write it."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"a path of the state has {entry!r}")
