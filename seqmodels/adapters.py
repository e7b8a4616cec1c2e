"""Low-rank adapters in a model: which of its linear maps have one, and their sum with the matrices.

seqmodels.adapt(model, LoraConfig(rank=8, targets=("query", "value")), rngs=nnx.Rngs(0))
seqmodels.merge_adapters(model)
"""

import re
from collections.abc import Sequence

from flax import nnx

from layers.adapters import new_adapter
from layers.options import Fraction, Positive, checked_dataclass, suggestion
from layers.parameters import Linear
from seqmodels.embedding import Embedding
from seqmodels.names import names_of

ALL, EMBEDDING = "all-linear", "embedding"


@checked_dataclass(section="lora")
class LoraConfig:
    """Options of the adapters of a model.

    Attributes:
      rank: r, the rank of each ("r" with peft).
      alpha: numerator of the scale alpha / r ("lora_alpha").
      rslora: whether the scale is alpha / sqrt(r).
      dropout: rate with which the inputs of adapters are dropped in training ("lora_dropout"); for maps inside layers.
      targets: which linear maps have one ("target_modules"): last parts of their names by layer, such as ("query", "value"),
        regular expressions for whole names, such as "stack/blocks/[01]/mixer/.*", or "all-linear", all but the head and those
        with fewer inputs or outputs than the rank.
    """

    rank: int = 8
    alpha: Positive = 8.0
    rslora: bool = False
    dropout: Fraction = 0.0
    targets: str | tuple[str, ...] = ALL

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError(f"lora.targets={self.targets!r}; expected at least one name")
        for target in self.each_target:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(
                    f"lora.targets={self.targets!r}: {target!r} is no regular expression: {error}"
                ) from None

    @property
    def each_target(self) -> tuple[str, ...]:
        """The targets, also if there is one."""
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)


def linear_maps(model: nnx.Module) -> dict[tuple[str, ...], Linear | Embedding]:
    """Returns the linear maps of a model and its table of embeddings by their names by layer; stacked ones have several names."""
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) or (isinstance(module, Embedding) and hasattr(module, "table")):
            names = names_of((*path, "kernel"), module.kernel).names
            found[tuple(name.removesuffix("kernel").removesuffix("/") for name in names)] = module
    return found


def adapt(model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> tuple[str, ...]:
    """Gives linear maps of a model new adapters, and returns their names. The outputs of the model do not change.

    Raises:
      ValueError: a target names no linear map, or some of several stacked layers only; or the rank is larger than a matrix.
    """
    maps = linear_maps(model)
    _check_targets(config, [name for names in maps for name in names])
    adapted: list[str] = []
    for names, module in maps.items():
        small = config.rank > min(module.kernel.shape[-2:])
        targets = [target for target in config.each_target if not (small and target == ALL)]
        chosen = [name for name in names if any(is_target(name, target) for target in targets)]
        if not chosen:
            continue
        if config.dropout and not chosen[0].startswith("stack/blocks/"):
            raise ValueError(
                f"lora.dropout={config.dropout} with lora.targets={config.targets!r}, which fits {chosen[0]}: inputs are dropped inside "
                "layers only; expected 0, or other targets"
            )
        if len(chosen) < len(names):
            left = next(name for name in names if name not in chosen)
            raise ValueError(
                f"lora.targets={config.targets!r} fits {chosen[0]} and not {left}, which are stacked; set scan=False in the config "
                "of the model"
            )
        try:
            options = dict(alpha=config.alpha, stabilized=config.rslora, dropout=config.dropout)
            module.adapter = new_adapter(module, config.rank, rngs=rngs, **options)
        except ValueError as error:
            raise ValueError(f"lora: {names[0]}: {error}") from None
        adapted += names
    if not adapted:
        largest = max(min(module.kernel.shape[-2:]) for module in maps.values())
        raise ValueError(
            f"lora.rank={config.rank} is above {largest}, the largest rank of a matrix of the model"
        )
    return tuple(adapted)


def is_target(name: str, target: str) -> bool:
    """Returns whether a target (see `LoraConfig`) has the linear map of a name."""
    if target == ALL:
        return name.split("/")[0] not in ("head", EMBEDDING)
    return f"/{name}".endswith(f"/{target}") or re.fullmatch(target, name) is not None


def _check_targets(config: LoraConfig, names: Sequence[str]) -> None:
    last = sorted({name.split("/")[-1] for name in names})
    for target in config.each_target:
        if not any(is_target(name, target) for name in names):
            near = suggestion(target, last) or suggestion(target, names)
            raise ValueError(
                f"lora.targets={config.targets!r}: {target!r} fits no linear map{near}; the model's are called {', '.join(last)}"
            )


def has_adapters(model: nnx.Module) -> bool:
    """Returns whether a linear map of the model has an adapter."""
    return any(module.adapter is not None for module in linear_maps(model).values())


def merge_adapters(model: nnx.Module) -> None:
    """Adds all adapters of a model to its matrices, in their type, and removes them.

    Raises:
      ValueError: an adapter of the table of embeddings, to which the head is tied.
    """
    tied = getattr(model, "head", True) is None
    if tied and model.embedding.adapter is not None:
        raise ValueError(
            "the model has an adapter of its embeddings, and its head reads the same table (tie_embeddings=True), which would change "
            "too; expected a model with a head of its own, or the adapter beside it"
        )
    for module in linear_maps(model).values():
        if module.adapter is not None:
            module.kernel.set_value(module.matrix.astype(module.kernel.dtype))
            module.adapter = nnx.data(None)


def without_adapters(model: nnx.Module) -> nnx.Module:
    """Returns the model without its adapters; the arrays are shared."""
    bare = nnx.merge(*nnx.split(model))
    for module in linear_maps(bare).values():
        module.adapter = nnx.data(None)
    return bare
