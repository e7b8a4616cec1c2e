"""Optimizers of training: optax chains over the tree of parameters, with a learning rate and a decay per group."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import optax

from experiments.training.model import Declaration
from experiments.training.optimizers.config import Group, OptimizerConfig, assign_groups
from experiments.training.optimizers.schedules import schedule
from experiments.training.optimizers.transforms import StepCount, decay_and_scale, direction
from layers.typing import Array, Float, Int

# Rules whose updates have a size that gradients do not change.
WITH_RATES = ("adamw", "lion")

__all__ = ["Group", "Optimizer", "OptimizerConfig", "StepCount", "assign_groups"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule of a training run.

    Attributes:
      declarations: declarations of the parameters by name.
      warmup_steps, total_steps: numbers of steps of the schedule.
    """

    config: OptimizerConfig
    declarations: Mapping[str, Declaration]
    warmup_steps: int
    total_steps: int

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"the warm-up of {self.warmup_steps} steps is not shorter than the training of {self.total_steps}; "
                "lower optimizer.warmup_epochs (or warmup_steps) or train longer"
            )
        _ = self.groups

    @functools.cached_property
    def groups(self) -> dict[str, Group]:
        """The group of each parameter, with its factor on the learning rate, which leaves that times the weight decay as it is.

        Raises:
          ValueError: if an entry of `config.groups` covers no parameter, or the rule has no factors.
        """
        chosen, groups = assign_groups(self.config, {n: d.group for n, d in self.declarations.items()})
        rates = {name: d.rate for name, d in self.declarations.items()}
        if self.config.name not in WITH_RATES and any(rate != 1 for rate in rates.values()):
            raise ValueError(
                f"model.base_width is given, whose learning rates are those of Adam, with optimizer.name={self.config.name!r}; "
                f"expected one of {', '.join(WITH_RATES)}"
            )
        return {name: _with_rate(groups[entry], rates[name]) for name, entry in chosen.items()}

    def schedule(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the factor on all learning rates in update number `step`, counted from 0."""
        return schedule(self.config, step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)

    def is_elementwise(self, declaration: Declaration) -> bool:
        """Whether the rule is elementwise, and the same for all parameters of one group."""
        if self.config.name == "muon":
            return not declaration.is_hidden_matrix
        return self.config.name in ("adamw", "lion")

    def transformation(
        self, declarations: Mapping[str, Declaration] | None = None
    ) -> optax.GradientTransformation:
        """Returns the whole rule, from gradients to parameter updates.

        Args:
          declarations: declarations of the arrays that the rule updates, if some parameters are packed into vectors.
        """
        declarations = self.declarations if declarations is None else declarations
        matrices = {name: d.is_hidden_matrix for name, d in declarations.items()}
        ranks = {name: len(d.shape) for name, d in declarations.items()}
        groups = {name: self.groups[next(iter(d.members), name)] for name, d in declarations.items()}
        clip = [] if self.config.clip_norm is None else [optax.clip_by_global_norm(self.config.clip_norm)]
        return optax.chain(
            *clip, direction(self.config, matrices, ranks), decay_and_scale(groups, self.schedule)
        )

    def table(self) -> str:
        """Returns a readable table of the groups in use, their sizes, rates and declared groups."""
        rows = [("group", "arrays", "numbers", "learning rate", "weight decay", "declared as")]
        for group in sorted(set(self.groups.values()), key=lambda group: group.name):
            members = [self.declarations[name] for name in self.groups if self.groups[name] == group]
            rows.append(
                (
                    group.name,
                    f"{sum(len(d.names.names) for d in members)}",
                    f"{sum(d.size for d in members)}",
                    f"{group.learning_rate:g}",
                    f"{group.weight_decay:g}",
                    ", ".join(sorted({d.group for d in members})),
                )
            )
        return _aligned(rows)


def _with_rate(group: Group, rate: float) -> Group:
    """Returns the group with a factor on its learning rate."""
    if rate == 1:
        return group
    return Group(f"{group.name}*{rate:.4g}", group.learning_rate * rate, group.weight_decay / rate)


def _aligned(rows: list[tuple[Any, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
