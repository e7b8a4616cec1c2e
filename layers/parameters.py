"""Parameters, the groups that optimizers treat differently, and the logical axes that meshes of devices divide.

A parameter declares its group where it is created. A group is a path: what an experiment sets for "ssm" also holds for "ssm/b",
unless it sets "ssm/b" itself. Parameters without a group are "default".

    no_decay     biases, the scales of norms, and decay rates that learn as fast as the rest: no weight decay. Trained initial
                 states are "no_decay/start", so that an experiment can train them alone
    ssm          the time scales of a state space model: eigenvalues, step sizes ("ssm/dt"), and its
                 input matrix ("ssm/b"): no weight decay, and a third of the learning rate, as S5 has on ListOps
    ssm_output   the output matrix and the skip of a state space model: as the rest

`GROUP_RULES` holds these as factors. They are part of the declaration: every experiment has them, unless it sets others.

A parameter also declares a name for each of its axes. `layers.sharding_rules` says which axis of a mesh of devices
divides which of them:

    embed    features of the residual stream           heads    heads, or heads times their features
    inner    channels inside a mixer                   mlp      hidden features of a channel mixer
    vocab    tokens of a vocabulary                    expert   experts of a mixture
    state    modes or features of a recurrent state    layer    repeats of a pattern, in front of all others

None stands for an axis that is never divided, such as taps, ranks and the features of a single head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

NO_DECAY = {"group": "no_decay"}
# Factors on the learning rate and the weight decay of an experiment, by group; 1 where there is none.
GROUP_RULES = {
    "no_decay": {"weight_decay": 0.0},
    "ssm": {"learning_rate": 1 / 3, "weight_decay": 0.0},
}
LOGICAL_AXES = ("embed", "heads", "inner", "mlp", "vocab", "expert", "state", "layer")
Axes = tuple[str | None, ...]

_lecun_normal = nnx.initializers.lecun_normal()
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def parameter(
    rngs: nnx.Rngs,
    init: Initializer,
    shape: tuple[int, ...],
    *,
    group: str = "default",
    axes: Axes | None = None,
) -> nnx.Param:
    """Returns a float32 parameter drawn from `init`, in an optimizer group and with logical axes.

    Args:
      axes: a name of `LOGICAL_AXES` or None for each axis of `shape`; None for an array that is never divided.

    Raises:
      ValueError: `axes` has an unknown name, or the wrong number of axes.
    """
    return declared(init(rngs.params(), shape, jnp.float32), group=group, axes=axes)


def declared(value: jax.Array, *, group: str = "default", axes: Axes | None = None) -> nnx.Param:
    """Returns a parameter with this initial value, in an optimizer group and with logical axes; see `parameter`."""
    axes = (None,) * value.ndim if axes is None else tuple(axes)
    unknown = [name for name in axes if name is not None and name not in LOGICAL_AXES]
    if unknown or len(axes) != value.ndim:
        raise ValueError(
            f"axes={axes} of a parameter of shape {value.shape}; expected {value.ndim} of {', '.join(LOGICAL_AXES)} or None"
        )
    return nnx.Param(value, group=group, axes=axes)


def log_of_uniform(low: float, high: float) -> Initializer:
    """Initialiser: the logarithm of a uniform number between low and high."""
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, low, high))


def uniform_fan_in(part: float = 1.0) -> Initializer:
    """Initialiser: uniform in +-part / sqrt(inputs); part = 1 is that of PyTorch's linear maps and convolutions."""
    return nnx.initializers.variance_scaling(part**2 / 3, "fan_in", "uniform")


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Initialiser: uniform with variance 2 gain^2 / (inputs + outputs)."""
    return nnx.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


class Constant(nnx.Variable):
    """Float32 numbers that a layer draws or computes when it is created and that training does not change.

    For numbers that must be saved with the parameters (random features) or differ between layers (slopes by depth).
    """


class AuxiliaryLoss(nnx.Variable):
    """A float32 scalar, already weighted, that a layer adds to the training loss, such as the load balance of a router.

    The layer writes it in every call with a key; training adds the sum over all layers, once per example. It is zero
    before such a call and in inference.
    """


def group_of(variable: nnx.Variable) -> str:
    """Returns the group that a parameter declared."""
    return variable.get_metadata().get("group", "default")


def rate_of(variable: nnx.Variable) -> float:
    """Returns the factor on the learning rate of a parameter's group, 1 unless one was set (`seqmodels.width_transfer`)."""
    return variable.get_metadata().get("rate", 1.0)


def axes_of(variable: nnx.Variable) -> Axes:
    """Returns the logical axes that a parameter declared; None for each if it declared none."""
    return variable.get_metadata().get("axes") or (None,) * variable.ndim


class Linear(nnx.Linear):
    """The map y = x W + b, to which an adapter may add s x A B (see `layers.adapters`).

    The gradient of b is summed over tokens in float32, whatever the type of y.

    Attributes:
      adapter: the adapter, or None.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.adapter = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = self.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision)
        if self.bias is not None:
            # Spread before the cast: the gradient is then cast before it is summed.
            bias = jnp.zeros_like(y, jnp.float32) + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))
            y = y + bias.astype(y.dtype)
        return y if self.adapter is None else y + self.adapter(x, y.dtype)

    @property
    def matrix(self) -> jax.Array:
        """The whole matrix W + s A B, for layers that take its parts or apply it in other places."""
        kernel = self.kernel[...]
        return kernel if self.adapter is None else kernel + self.adapter.product


def linear(
    inputs: int,
    outputs: int,
    *,
    axes: tuple[str | None, str | None] = (None, None),
    bias: bool = True,
    dtype: Any = jnp.float32,
    init: Initializer = _lecun_normal,
    group: str = "default",
    rngs: nnx.Rngs,
) -> Linear:
    """Returns the map y = x W + b with float32 parameters, computed in `dtype`; b starts at zero and is not decayed.

    Args:
      axes: logical axes of inputs and outputs, see `parameter`.
    """
    return Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=init,
        kernel_metadata={"group": group, "axes": axes},
        bias_metadata={**NO_DECAY, "axes": axes[1:]},
        rngs=rngs,
    )
