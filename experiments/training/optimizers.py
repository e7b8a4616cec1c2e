"""AdamW with groups of parameters, on one vector a group.

u = Adam's direction (Kingma and Ba 2015), from gradients clipped to a global norm
p <- p - r_g s(step) (u + w_g p)            (Loshchilov and Hutter 2019; r_g, w_g of the parameter's group)
s = (step + 1) / warm-up in the warm-up, then f + (1 - f) (1 + cos(pi x)) / 2 with x from 0 to 1
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from experiments.config.loading import check_integer, check_number
from experiments.training.model import Layout, Path, Vectors
from layers.registry import suggestion
from layers.typing import Array, Float, Int

DEFAULT = "default"
NO_DECAY = "no_decay"
OVERRIDES = ("learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The section `optimizer`.

    Attributes:
      learning_rate: peak learning rate of parameters that no entry of `groups` covers.
      weight_decay: of those; multiplied with the learning rate.
      groups: overrides of the two by declared group. An entry covers the groups below it too ("ssm" covers "ssm/dt")
        where no longer entry does. "no_decay" has weight decay 0 unless it is given here.
      warmup_epochs: epochs in which all learning rates rise linearly to their peaks; or give `warmup_steps`.
      warmup_steps: the same in steps.
      final_learning_rate: where the cosine after the warm-up ends, as a fraction of the peak, in every group.
      clip_norm: gradients of a larger global norm are scaled down to this; None for no clipping.
      ema: decay a step of an exponential moving average of the parameters, used for evaluation; None for none.
      b1, b2, epsilon: of Adam.
    """

    learning_rate: float
    weight_decay: float = 0.0
    groups: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    final_learning_rate: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        check_number("optimizer.learning_rate", self.learning_rate, above=0.0)
        check_number("optimizer.weight_decay", self.weight_decay, least=0.0)
        check_number("optimizer.epsilon", self.epsilon, above=0.0)
        for name in ("final_learning_rate", "b1", "b2"):
            _check_fraction(
                f"optimizer.{name}", getattr(self, name), include_one=name == "final_learning_rate"
            )
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("set optimizer.warmup_epochs or optimizer.warmup_steps and leave the other None")
        if self.warmup_epochs is not None:
            check_number("optimizer.warmup_epochs", self.warmup_epochs, least=0.0)
        if self.warmup_steps is not None:
            check_integer("optimizer.warmup_steps", self.warmup_steps, least=0)
        if self.clip_norm is not None:
            check_number("optimizer.clip_norm", self.clip_norm, above=0.0)
        if self.ema is not None:
            _check_fraction("optimizer.ema", self.ema)
        for group, overrides in self.groups.items():
            self._check_group(group, overrides)

    def _check_group(self, group: str, overrides: Any) -> None:
        name = f"optimizer.groups[{group!r}]"
        if group == DEFAULT:
            raise ValueError(f"{name}: set optimizer.learning_rate and optimizer.weight_decay themselves")
        if not isinstance(overrides, Mapping) or not overrides:
            raise TypeError(f"{name}={overrides!r}; expected a dict with {' or '.join(OVERRIDES)}")
        for field, value in overrides.items():
            if field not in OVERRIDES:
                raise ValueError(f"{name} has no field {field!r}{suggestion(field, OVERRIDES)}")
            check_number(f"{name}.{field}", value, least=0.0)


def _check_fraction(name: str, value: Any, *, include_one: bool = False) -> None:
    check_number(name, value, least=0.0)
    if value > 1 or (value == 1 and not include_one):
        raise ValueError(
            f"{name}={value!r}; expected at most 1" if include_one else f"{name}={value!r}; expected below 1"
        )


@dataclasses.dataclass(frozen=True)
class Group:
    """Peak learning rate and weight decay of one group of parameters."""

    learning_rate: float
    weight_decay: float


def assign_groups(
    config: OptimizerConfig, declared: Mapping[Path, str]
) -> tuple[dict[Path, str], dict[str, Group]]:
    """The entry of the config that covers each parameter, and the rates of each entry in use.

    Raises:
      ValueError: if an entry of `config.groups` covers no parameter.
    """
    entries = {NO_DECAY: {"weight_decay": 0.0}} | {name: dict(value) for name, value in config.groups.items()}
    chosen = {path: _longest_prefix(group, entries) for path, group in declared.items()}
    used = set(chosen.values())
    existing = sorted(set(declared.values()))
    for name in config.groups:
        if name not in used:
            raise ValueError(
                f"optimizer.groups[{name!r}] covers no parameter{suggestion(name, existing)}; "
                f"the model's groups: {', '.join(existing)}"
            )
    common = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    return chosen, {name: Group(**(common | entries.get(name, {}))) for name in sorted(used)}


def _longest_prefix(group: str, entries: Mapping[str, Any]) -> str:
    parts = group.split("/")
    prefixes = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in entries), DEFAULT)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule of a training run.

    Attributes:
      groups: the groups of the layout.
      warmup_steps, total_steps: of the schedule.
    """

    config: OptimizerConfig
    groups: Mapping[str, Group]
    warmup_steps: int
    total_steps: int

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"the warm-up of {self.warmup_steps} steps is not shorter than the training of {self.total_steps}; "
                "lower optimizer.warmup_epochs (or warmup_steps) or train longer"
            )

    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.config.b1, self.config.b2, self.config.epsilon)

    def init(self, parameters: Vectors) -> optax.ScaleByAdamState:
        """The state before the first step: zero moments."""
        return self._adam().init(parameters)

    def schedule(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The factor s on all learning rates in the update number `step`, counted from 0."""
        step = jnp.asarray(step, jnp.float32)
        x = jnp.clip((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0.0, 1.0)
        last = self.config.final_learning_rate
        cosine = last + (1 - last) * 0.5 * (1 + jnp.cos(jnp.pi * x))
        return jnp.where(step < self.warmup_steps, (step + 1) / max(self.warmup_steps, 1), cosine)

    def update(
        self, step: Int[Array, ""], parameters: Vectors, gradients: Vectors, state: optax.ScaleByAdamState
    ) -> tuple[Vectors, optax.ScaleByAdamState, Float[Array, ""]]:
        """New parameters and state, and the global norm of the gradients before clipping."""
        norm = optax.tree.norm(gradients)
        if self.config.clip_norm is not None:
            scale = self.config.clip_norm / jnp.maximum(norm, self.config.clip_norm)
            gradients = {name: scale * gradient for name, gradient in gradients.items()}
        direction, state = self._adam().update(gradients, state)
        factor = self.schedule(step)
        parameters = {
            name: p - factor * group.learning_rate * (direction[name] + group.weight_decay * p)
            for name, p in parameters.items()
            for group in [self.groups[name]]
        }
        return parameters, state, norm


def groups_table(layout: Layout, groups: Mapping[str, Group], declared: Mapping[Path, str]) -> str:
    """The groups in use as a table: arrays, numbers, peak learning rate, weight decay, and who declared what."""
    rows = [("group", "arrays", "numbers", "learning rate", "weight decay", "declared as")]
    for name, part in layout.groups.items():
        names = ", ".join(sorted({declared[path] for path, _ in part}))
        group = groups[name]
        numbers = (
            f"{len(part)}",
            f"{layout.sizes[name]}",
            f"{group.learning_rate:g}",
            f"{group.weight_decay:g}",
        )
        rows.append((name, *numbers, names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
