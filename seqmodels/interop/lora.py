"""Low-rank adapters in the format of peft, whose products are added to the tensors of a checkpoint as these are read.

An adapter of the rank r adds s B A to a matrix, with A (r, inputs), B (outputs, r) and s = alpha / r, or alpha / sqrt(r) if
it is rank-stabilized (Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732). An adapter of stacked experts has the
factors of E experts in one pair (r E, inputs) and (outputs, E r), the first expert by expert and the second rank by rank:

    A_e = A[e r : (e + 1) r],    B_e = B[:, e :: E]
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from layers.adapters import scale_of
from layers.options import suggestion
from seqmodels.interop import files
from seqmodels.interop.options import Options

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")
# peft stores the table that an adapter of embeddings belongs to beside it.
BASE = ".base_layer.weight"
# Several adapters of the parameters of one module lie within each other, the first parameter's innermost.
WITHIN = ".base_layer"
# Parameters of stacked experts in the order in which transformers has them, with the arrays of ours that they hold.
EXPERTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
# What says where adapters are, which their tensors say too, how they start and are trained, and what ran.
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
)
# Kinds of adapters that add something else.
OTHERS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "modules_to_save",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
)


class Adapter:
    """What an adapter adds to the tensors of a checkpoint.

    Attributes:
      folder: where it lies.
      modules: names of the modules that it adapts, without ".weight", with the ends of the names of their factors.
      experts: names of the modules of stacked experts, with the names in this adapter of the modules of their parameters.
      stabilized: whether scales are alpha / sqrt(r).
      dropout: rate with which inputs are dropped in training.

    Raises:
      ValueError: the folder has no adapter, one of another kind, or factors that do not fit together.
    """

    def __init__(self, folder: Path, tensors: files.Tensors):
        file = folder / CONFIG
        options = Options(files.read_json(file), of=str(file))
        options.ignore(*WITHOUT_EFFECT)
        options.only("peft_type", "LORA")
        options.only("bias", "none")
        for name in ("use_dora", "use_qalora", "lora_bias"):
            options.only(name, False)
        for name in OTHERS:
            options.only(name, None, [], {})
        options.take("r")
        self.dropout = float(options.take("lora_dropout", 0.0))
        self._alpha, self._alphas = options.take("lora_alpha"), options.take("alpha_pattern", None) or {}
        self.stabilized, self._turned = (
            options.take("use_rslora", False),
            options.take("fan_in_fan_out", False),
        )
        targets = options.take("target_parameters", None) or []
        options.check_all_read()
        self._tensors, self.folder = tensors, folder
        known = (*FACTORS, *EMBEDDING_FACTORS)
        self._bases = {name for name in tensors.names if name.endswith(BASE)}
        names = tensors.names - self._bases
        ends = {name: next((end for end in known if name.endswith(end)), None) for name in names}
        for name, end in ends.items():
            if end is None or not name.startswith(PREFIX):
                raise ValueError(
                    f"{folder} has the tensor {name}, which is not supported; expected {PREFIX}NAME with {' or '.join(FACTORS)}, or "
                    f"{' or '.join(EMBEDDING_FACTORS)}"
                )
        self.modules = {
            name.removeprefix(PREFIX).removesuffix(end): EMBEDDING_FACTORS
            if end in EMBEDDING_FACTORS
            else FACTORS
            for name, end in ends.items()
        }
        for module, own in self.modules.items():
            if missing := [end for end in own if PREFIX + module + end not in tensors.names]:
                raise ValueError(f"{folder} lacks the tensor {PREFIX}{module}{missing[0]}")
        self.experts = self._stacked(targets)
        for inner in self.experts.values():
            for module in inner.values():
                del self.modules[module]

    def _stacked(self, targets: Sequence[str]) -> dict[str, dict[str, str]]:
        """Returns `experts`, given the names of the parameters that the adapter is of."""
        found: dict[str, list[str]] = {}
        own: dict[str, list[str]] = {}
        for module in self.modules:
            whole = module.replace(WITHIN, "")
            own[whole] = [
                name
                for name in EXPERTS
                if any(f".{whole}.{name}".endswith(f".{target}") for target in targets)
            ]
            if own[whole] or module != whole:
                found.setdefault(whole, []).append(module)
        experts = {}
        for whole, modules in found.items():
            if len(own[whole]) != len(modules):
                raise ValueError(
                    f"{self.folder} has {len(modules)} adapters of {whole}, of whose parameters target_parameters={list(targets)} has "
                    f"{', '.join(own[whole]) or 'none'}; expected stacked experts with {' and '.join(EXPERTS)}, one adapter each"
                )
            inner = sorted(modules, key=lambda module: -module.count(WITHIN))
            experts[whole] = dict(zip(own[whole], inner, strict=True))
        return experts

    def add_experts(
        self, whole: str, parameter: str, part: int, array: np.ndarray, alternating: bool
    ) -> np.ndarray:
        """Returns an array of ours (experts, inputs, outputs) with what is added to it.

        Args:
          whole, parameter: the module and its parameter that holds the array.
          part: place of the array among those of the parameter.
          alternating: whether the outputs of the arrays of the parameter take turns; they follow each other otherwise.
        """
        if (module := self.experts[whole].get(parameter)) is None:
            return array
        a, b, alpha = self.factors(module, f"{whole}.{parameter}")
        count, inputs, outputs = array.shape
        parts = len(EXPERTS[parameter])
        shapes = (len(a), inputs), (outputs * parts, len(a))
        if (a.shape, b.shape) != shapes or len(a) % count:
            raise ValueError(
                f"{self.folder} has factors of the shapes {a.shape} and {b.shape} for {whole}.{parameter} of {count} experts of {inputs} "
                f"inputs and {outputs * parts} outputs; expected {count} r rows and columns of {inputs} and {outputs * parts}"
            )
        rank = len(a) // count
        own = slice(part, None, parts) if alternating else slice(part * outputs, (part + 1) * outputs)
        b = b[own].reshape(outputs, rank, count)
        product = a.reshape(count, rank, inputs).swapaxes(1, 2) @ b.transpose(2, 1, 0)
        return (array + scale_of(alpha, rank, self.stabilized) * product).astype(array.dtype)

    def check_base(self, module: str, tensor: np.ndarray) -> None:
        """Raises ValueError if the adapter holds another tensor of the checkpoint than this one."""
        if (name := PREFIX + module + BASE) not in self._bases:
            return
        own = self._tensors.read(name)
        if own.shape != tensor.shape or not np.array_equal(own.astype(tensor.dtype), tensor):
            raise ValueError(
                f"{self.folder} holds {name}, which differs from {module}.weight of the checkpoint; expected the adapter of this checkpoint"
            )

    @property
    def embeddings(self) -> list[str]:
        """Names of the modules that look up rows."""
        return [module for module, ends in self.modules.items() if ends == EMBEDDING_FACTORS]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless all factors belong to tensors of a checkpoint and have their sizes."""
        for module in sorted(self.modules):
            name = f"{module}.weight"
            if name not in shapes:
                raise ValueError(
                    f"{self.folder} adapts {name}{suggestion(name, shapes)}, which the checkpoint does not have"
                )
            ends = self.modules[module]
            (rank, inputs), (outputs, other) = (self._tensors.shape(PREFIX + module + end) for end in ends)
            expected = (inputs, outputs) if self._is_turned(module) else (outputs, inputs)
            if rank != other or expected != shapes[name]:
                raise ValueError(
                    f"{self.folder} has factors of the shapes {(rank, inputs)} and {(outputs, other)} for {name} of shape {shapes[name]}"
                )

    def add(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Returns a tensor of the checkpoint with what is added to it."""
        module = name.removesuffix(".weight")
        if module not in self.modules or module == name:
            return tensor
        self.check_base(module, tensor)
        a, b, alpha = self.factors(module)
        product = scale_of(alpha, len(a), self.stabilized) * (b @ a)
        return (tensor + (product.T if self._is_turned(module) else product)).astype(tensor.dtype)

    def _is_turned(self, module: str) -> bool:
        """Returns whether the matrix is (inputs, outputs)."""
        return self._turned or self.modules[module] == EMBEDDING_FACTORS

    def factors(self, module: str, name: str | None = None) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns A (r, inputs), B (outputs, r) and alpha of a module, which patterns may know by another name."""
        ends = self.modules.get(module, FACTORS)
        a, b = (self._tensors.read(PREFIX + module + end).astype(np.float32) for end in ends)
        name = module if name is None else name
        patterns = (value for key, value in self._alphas.items() if re.match(rf"(.*\.)?({key})$", name))
        return a, b, float(next(patterns, self._alpha))
