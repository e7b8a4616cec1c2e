"""In-context linear regression: the value of an unknown linear map at each input, from the examples before it."""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask, length_splits
from layers.options import Count, NonNegative, checked_dataclass
from layers.typing import Array, Float


@checked_dataclass(kw_only=True, eq=False)
class LinearRegression(SyntheticTask):
    """Rows x_1 y_1 ... x_n y_n with y_i = w . x_i, whose w the model learns from the row (Garg et al. 2022, arXiv:2208.01066).

    x_i and w are standard normal in `dims` dimensions, and w is new in every row. A token is a vector of `dims` numbers, x_i or
    (y_i, 0, ..., 0), and the output at x_i is to be y_i. The loss is the squared error, averaged over all prefixes and divided
    by the number of weights that are not zero, so that without noise the answer 0 has loss 1. "error_after_k" is that at the
    inputs with k examples before them.

    Attributes:
      dims: d, dimensions of inputs, at least 2.
      points: n, pairs per row.
      sparse: number of weights that are not zero; None for all.
      noise: standard deviation of what is added to every y_i.
      measured: numbers of examples with an error of their own; 0, d / 2, d and 2 d, as far as they are below n, if None.
      extrapolate: pairs per row of further splits; 40 gives "length_40".
    """

    causal: ClassVar[bool] = True
    output_size: ClassVar[int] = 1
    selection_metric: ClassVar[tuple[str, str]] = ("loss", "min")

    train: int = 1_000_000
    validation: int = 500
    test: int = 1000
    dims: int = 5
    points: int = 11
    sparse: int | None = None
    noise: NonNegative = 0.0
    measured: tuple[Count, ...] | None = None
    extrapolate: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dims < 2:
            raise ValueError(f"dims={self.dims}; expected at least 2")
        if self.sparse is not None and self.sparse > self.dims:
            raise ValueError(
                f"sparse={self.sparse} of dims={self.dims} weights; expected at most {self.dims}"
            )
        for after in self.measured or ():
            if after >= self.points:
                raise ValueError(
                    f"measured has {after}, but points={self.points} have at most {self.points - 1} examples before them"
                )

    @property
    def input_size(self) -> int:
        return self.dims

    @property
    def further_splits(self) -> tuple[str, ...]:
        return tuple(length_splits(self.extrapolate))

    def points_of(self, split: str) -> int:
        """Returns the number of pairs per row of a split."""
        return length_splits(self.extrapolate).get(split, self.points)

    def width(self, split: str) -> int:
        return 2 * self.points_of(split)

    @property
    def weights(self) -> int:
        """Number of weights that are not zero, which is the variance of y without noise."""
        return self.dims if self.sparse is None else self.sparse

    @property
    def afters(self) -> tuple[int, ...]:
        """Numbers of examples with an error of their own."""
        if self.measured is not None:
            return self.measured
        usual = (0, self.dims // 2, self.dims, 2 * self.dims)
        return tuple(after for after in usual if after < self.points)

    @property
    def chance(self) -> float:
        """Loss of the answer 0."""
        return 1 + self.noise**2 / self.weights

    def make(self, draws: Draws, split: str) -> Arrays:
        points = self.points_of(split)
        x, w = draws.normal(points, self.dims), draws.normal(self.dims)
        if self.sparse is not None:
            kept = np.zeros(w.shape, bool)
            np.put_along_axis(kept, draws.distinct(self.dims, self.sparse), True, axis=1)
            w = np.where(kept, w, 0.0)
        y = np.einsum("bnd,bd->bn", x, w) + self.noise * draws.normal(points)
        inputs = np.zeros((len(draws), 2 * points, self.dims))
        inputs[:, ::2], inputs[:, 1::2, 0] = x, y
        labels = np.full(inputs.shape[:2], np.nan)
        labels[:, ::2] = y
        return {"inputs": inputs, "labels": labels}

    def loss(
        self, outputs: Float[Array, "b t 1"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss over prefixes, and sums over them: "loss", "count", and "error_after_k" with its count."""
        labels = batch["labels"]
        counted = ~jnp.isnan(labels) & (batch["weight"] > 0)[:, None]
        errors = jnp.where(counted, outputs[..., 0].astype(jnp.float32) - labels, 0.0)
        losses = jnp.square(errors) / self.weights
        sums = {"loss": jnp.sum(losses), "count": jnp.sum(counted)}
        for after in self.afters:
            here = slice(2 * after, 2 * after + 1)
            sums |= {
                f"error_after_{after}": jnp.sum(losses[:, here]),
                f"error_after_{after}_count": jnp.sum(counted[:, here]),
            }
        sums = {name: value.astype(jnp.float32) for name, value in sums.items()}
        return sums["loss"] / jnp.maximum(sums["count"], 1.0), sums

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the losses of the answer 0, "zero", of "least_squares" and of one "gradient_step", by number of examples too.

        See `least_squares` and `gradient_step`; "NAME_after_k" is the loss with k examples.
        """
        source, width = self.splits[split], self.width(split)
        batch = source.gather(np.arange(len(source)), width)
        x, y = batch["inputs"][:, ::2].astype(np.float64), batch["labels"][:, ::2].astype(np.float64)
        found = {"zero": np.zeros(y.shape), "least_squares": least_squares(x, y)}
        found["gradient_step"] = gradient_step(x, y, ridge=self.dims * self.noise**2 / self.weights)
        losses = {
            name: np.mean(np.square(answer - y), axis=0) / self.weights for name, answer in found.items()
        }
        means = {name: float(np.mean(by_prefix)) for name, by_prefix in losses.items()}
        return means | {
            f"{name}_after_{after}": float(losses[name][after])
            for name in losses
            for after in self.afters
            if after < self.points_of(split)
        }


def least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the prediction at each input of the least-squares solution of least norm for the examples before it.

    Args:
      x: inputs (b, n, d).
      y: values (b, n).

    Returns:
      Predictions (b, n): x_k . pinv(x_1 ... x_{k-1}) (y_1 ... y_{k-1}), the first of which is 0.
    """
    answers = np.zeros(y.shape)
    for k in range(1, y.shape[1]):
        w = np.einsum("bdk,bk->bd", np.linalg.pinv(x[:, :k]), y[:, :k])
        answers[:, k] = np.einsum("bd,bd->b", x[:, k], w)
    return answers


def gradient_step(x: np.ndarray, y: np.ndarray, *, ridge: float = 0.0) -> np.ndarray:
    """Returns the prediction at each input after one step of gradient descent from w = 0 on the examples before it.

        w_k = eta_k sum_{i < k} y_i x_i,   eta_k = 1 / (k - 1 + d + 1 + ridge)

    This is the step length of least expected error for standard normal inputs and weights, which linear attention learns
    (Zhang et al. 2023, arXiv:2306.09927): Gamma^-1 / N with Gamma = (1 + 1/N) I + (d / N) I.

    Args:
      x: inputs (b, n, d).
      y: values (b, n).
      ridge: d sigma^2 / s, with noise of variance sigma^2 and s weights that are not zero.

    Returns:
      Predictions (b, n), the first of which is 0.
    """
    count = np.arange(y.shape[1])
    gradients = np.cumsum(y[..., None] * x, axis=1) - y[..., None] * x
    return np.einsum("bnd,bnd->bn", x, gradients) / (count + x.shape[2] + 1 + ridge)
