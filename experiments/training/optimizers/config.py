"""The section `optimizer` of a config, and the parameter groups whose rates it sets."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from experiments.training.optimizers.schedules import SCHEDULES
from layers.options import (
    Bound,
    Count,
    Fraction,
    NonNegative,
    Positive,
    UnitInterval,
    check_number,
    checked_dataclass,
)
from layers.parameters import GROUP_RULES
from layers.registry import suggestion

RULES = ("adamw", "muon", "lion", "adafactor")
DEFAULT = "default"
OVERRIDES = ("learning_rate", "weight_decay")


@checked_dataclass(section="optimizer")
class OptimizerConfig:
    """The section `optimizer`.

    Attributes:
      name: update rule: "adamw", "muon", "lion" or "adafactor"; see `direction` in `transforms`.
      learning_rate: peak learning rate of parameters that no entry of `groups` covers.
      weight_decay: weight decay of these parameters, multiplied by the learning rate.
      groups: both by declared group, where they are not those that the group declares (`layers.parameters.GROUP_RULES`): no weight
        decay in "no_decay" and "ssm", and a third of the learning rate in "ssm". An entry also covers the groups below it:
        what "ssm/dt" does not set is that of "ssm".
      warmup_epochs: number of epochs in which all learning rates rise linearly to their peaks; alternative to
        `warmup_steps`.
      warmup_steps: number of steps of this warm-up.
      schedule: schedule of all learning rates after the warm-up: "cosine", "constant", "wsd" or "rsqrt"; see `schedules`.
      final_learning_rate: final value of "cosine" and "wsd" as a fraction of the peak, in every group.
      decay_fraction: fraction of all steps, at the end, in which "wsd" decays.
      clip_norm: global norm that gradients are clipped to; None for no clipping.
      skip_norm: global norm of the gradients, before clipping, above which a step changes no parameter, so that one bad batch
        does not undo a run; the log counts these steps. None for never.
      ema: decay per step of an exponential moving average of the parameters, used for evaluation; None for none.
      b1, b2, epsilon: constants of Adam; "lion" uses b1 and b2.
      muon_momentum, muon_rms: momentum of "muon", and root mean square of its updates of hidden matrices.
    """

    learning_rate: Positive
    name: Literal[*RULES] = "adamw"
    weight_decay: NonNegative = 0.0
    groups: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    warmup_epochs: NonNegative | None = None
    warmup_steps: Count | None = None
    schedule: Literal[*SCHEDULES] = "cosine"
    decay_fraction: Annotated[float, Bound(above=0, most=1)] = 0.2
    final_learning_rate: UnitInterval = 0.0
    clip_norm: Positive | None = None
    skip_norm: Positive | None = None
    ema: Fraction | None = None
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    epsilon: Positive = 1e-8
    muon_momentum: Fraction = 0.95
    muon_rms: Positive = 0.2

    def __post_init__(self) -> None:
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("set optimizer.warmup_epochs or optimizer.warmup_steps and leave the other None")
        for group, overrides in self.groups.items():
            self._check_group(group, overrides)

    def _check_group(self, group: str, overrides: Any) -> None:
        name = f"optimizer.groups[{group!r}]"
        if group == DEFAULT:
            raise ValueError(f"{name}: set optimizer.learning_rate and optimizer.weight_decay themselves")
        if not overrides:
            raise ValueError(f"{name}={overrides!r}; expected a dict with {' or '.join(OVERRIDES)}")
        for field, value in overrides.items():
            if field not in OVERRIDES:
                raise ValueError(f"{name} has no field {field!r}{suggestion(field, OVERRIDES)}")
            check_number(f"{name}.{field}", value, least=0.0)


@dataclasses.dataclass(frozen=True)
class Group:
    """Peak learning rate and weight decay of one group of parameters.

    Attributes:
      name: entry of the config or of the declared rules that sets them, or "default".
      learning_rate: peak learning rate.
      weight_decay: weight decay, multiplied by the learning rate.
    """

    name: str
    learning_rate: float
    weight_decay: float


def assign_groups(
    config: OptimizerConfig, declared: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Group]]:
    """Returns the entry of the config that covers each parameter, and the rates of each entry in use.

    Raises:
      ValueError: if an entry of `config.groups` covers no parameter.
    """
    entries = GROUP_RULES.keys() | config.groups.keys()
    chosen = {name: _longest_prefix(group, entries) for name, group in declared.items()}
    used = set(chosen.values())
    existing = sorted(set(declared.values()))
    for name in config.groups:
        if name not in used:
            raise ValueError(
                f"optimizer.groups[{name!r}] covers no parameter{suggestion(name, existing)}; "
                f"the model's groups: {', '.join(existing)}"
            )
    return chosen, {name: _rates(config, name) for name in sorted(used)}


def _rates(config: OptimizerConfig, name: str) -> Group:
    """Returns the rates of an entry: those of the config, changed by the declared rules and entries from "ssm" to "ssm/dt"."""
    rates = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    for prefix in reversed(_prefixes(name)):
        rates |= {
            field: getattr(config, field) * factor for field, factor in GROUP_RULES.get(prefix, {}).items()
        }
        rates |= config.groups.get(prefix, {})
    return Group(name, **rates)


def _longest_prefix(group: str, entries: Collection[str]) -> str:
    return next((prefix for prefix in _prefixes(group) if prefix in entries), DEFAULT)


def _prefixes(group: str) -> list[str]:
    """Returns the group and those above it, the longest first."""
    parts = group.split("/")
    return ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
