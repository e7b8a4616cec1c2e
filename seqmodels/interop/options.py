"""The options of a published model's config.json: each is read, refused, or known to change no output."""

import re
from collections.abc import Mapping
from typing import Any

from layers.options import suggestion

# What no output of a model in inference depends on: names, tokens of special meaning, initial values, dropout, losses, caches.
IGNORED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_fast": "gelu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
# Their name of each activation of ours.
THEIR_ACTIVATIONS = {
    "gelu_erf": "gelu",
    "gelu": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
# Names of numbers of heads, layers and so on, which may be 0, and of those without which there is no model.
COUNTS = re.compile("(num|n)_.+|.+_(size|heads|dim|layers)|d_model")
NEEDED_COUNTS = re.compile(
    "(vocab|hidden|intermediate)_size|(num|n)_(hidden_layers|attention_heads|heads|head|layers|layer|embd)|d_model"
)
_NEEDED = object()


class Options:
    """The options of a config.json, which remembers which were read."""

    def __init__(self, values: Mapping[str, Any], *, of: str, length: int | None = None):
        """Takes the options.

        Args:
          of: name of the file in messages.
          length: number of tokens that rows will have, if that is known, where positions depend on it.
        """
        self.length = length
        self._values, self._of, self._used = dict(values), of, set(IGNORED)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = _NEEDED) -> Any:
        """Returns an option, or the default where it is left out.

        Raises:
          ValueError: it is left out and has no default, or is a number of something by its name and no such number.
        """
        self._used.add(name)
        value = self._values.get(name, default)
        if value is _NEEDED:
            raise ValueError(f"{self._of} lacks the option {name!r}{suggestion(name, self._values)}")
        if COUNTS.fullmatch(name) and value is not None and not isinstance(value, list | tuple):
            least = 1 if NEEDED_COUNTS.fullmatch(name) else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                self.refuse(name, value, f"an integer of at least {least}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Returns an option that is true or false, also where its name is like that of a number."""
        self._used.add(name)
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def only(self, name: str, *expected: Any) -> None:
        """Raises ValueError unless an option is left out or has one of the values that are supported."""
        value = self.take(name, expected[0])
        if value not in expected:
            self.refuse(name, value, " or ".join(map(repr, expected)))

    def ignore(self, *names: str) -> None:
        """Takes note of options that change no output."""
        self._used.update(names)

    def activation(self, name: str, default: Any = _NEEDED) -> str:
        """Returns our name of the activation that an option names."""
        value = self.take(name, default)
        if value not in ACTIVATIONS:
            self.refuse(name, value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str, value: Any, expected: str) -> None:
        """Raises ValueError for an option that is not supported."""
        raise ValueError(f"{self._of} has {name}={value!r}, which is not supported; expected {expected}")

    def check_all_read(self) -> None:
        """Raises ValueError if there are options that nothing read."""
        left = [name for name in self._values if name not in self._used and not name.startswith("_")]
        if left:
            stated = ", ".join(f"{name}={self._values[name]!r}" for name in left)
            raise ValueError(f"{self._of} has options that are not supported: {stated}")
