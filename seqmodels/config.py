"""Configs of models, as frozen dataclasses, and how they are read from plain mappings."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from layers.channel.glu import ACTIVATIONS
from layers.options import Bound, Count, NonNegative, Positive, UnitInterval, checked_dataclass
from layers.registry import choose, make_config, suggestion
from seqmodels.deletion import DeletionConfig
from seqmodels.input_config import InputConfig
from seqmodels.stack_config import StackConfig

WHOLE = {"mixer_defaults": {"causal": False, "bidirectional": True}}  # of an encoder


@checked_dataclass
class ClassifierConfig:
    """Config of a model that gives one label per sequence.

    Attributes:
      input, stack: see `InputConfig` and `StackConfig`.
      num_classes: c, number of classes.
      pooling: vector per row: "mean" over real tokens, the "last" real token, or the "first".
      final_norm: whether a norm lies between stack and pooling.
      molecules: number of tokens that the stack reads as one, after a layer of single ones (CANINE); None for 1.
      characters: fields of `StackConfig` in which the layers before differ, of which there is one by default.
    """

    input: InputConfig
    stack: StackConfig
    num_classes: Annotated[int, Bound(least=2)]
    pooling: Literal["mean", "last", "first"] = "mean"
    final_norm: bool = True
    molecules: Annotated[int, Bound(least=2)] | None = None
    characters: Mapping[str, Any] | StackConfig = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.molecules is not None:
            object.__setattr__(
                self, "characters", _other_stack("characters", self.stack, {"depth": 1}, self.characters)
            )
        elif self.characters:
            raise ValueError(
                f"characters={self.characters!r} has no effect without molecules; expected molecules=4 or more"
            )


@checked_dataclass
class DualEncoderConfig:
    """Config of a model that gives one label per pair of sequences.

    Attributes:
      input, stack: see `InputConfig` and `StackConfig`; both sequences pass the same ones.
      num_classes: c, number of classes.
      pooling: vector per sequence: "mean" over real tokens, the "last" real token, or the "first".
      final_norm: whether a norm lies between stack and pooling.
      interaction: features of a pair with the vectors u and v: "nli", [u, v, u * v, u - v], or "none", [u, v].
      head_sizes: number of units of each hidden layer between the features of a pair and the logits; one layer of the width
        of the stack if None, as in S4 and S5. Long Range Arena has two.
      head_activation: activation of these layers.
    """

    input: InputConfig
    stack: StackConfig
    num_classes: Annotated[int, Bound(least=2)]
    pooling: Literal["mean", "last", "first"] = "mean"
    final_norm: bool = True
    interaction: Literal["nli", "none"] = "nli"
    head_sizes: tuple[int, ...] | None = None
    head_activation: Literal["gelu", "relu"] = "gelu"


@checked_dataclass
class LanguageModelConfig:
    """Config of a model that gives the logits of the next token at each position.

    Attributes:
      input, stack: see `InputConfig` and `StackConfig`; inputs must be tokens.
      tie_embeddings: whether the output matrix is the embedding matrix.
      final_norm: whether a norm precedes the output matrix.
      logit_scale: factor on the logits before they are bounded (Granite).
      logit_cap: bound of the logits, applied by tanh (Gemma 2); None for none.
    """

    input: InputConfig
    stack: StackConfig
    tie_embeddings: bool = True
    final_norm: bool = True
    logit_scale: Positive = 1.0
    logit_cap: Positive | None = None

    def __post_init__(self) -> None:
        if self.input.vocab_size is None:
            raise ValueError("a language model needs vocab_size; input_size is for classifiers of vectors")


@checked_dataclass
class RecurrentMemoryConfig(LanguageModelConfig):
    """Config of a language model that reads a text in segments and hands a memory from one to the next.

    Attributes:
      memory: m, vectors of the memory.
      segment: tokens of a segment.
      unroll: segments through which gradients pass; None for all.
    """

    memory: int = 16
    segment: int = 512
    unroll: int | None = None


@checked_dataclass
class HierarchicalMemoryConfig(RecurrentMemoryConfig):
    """Config of a language model that reads a text in segments and recalls the memories of earlier ones.

    Attributes:
      memory: 1, the vectors that a segment leaves.
      recall: memories that are kept, of the last segments.
      sensory: last tokens of the segment before, which stand before those of a segment.
      summary: part of a segment, its beginning, by which memories are recalled.
      recall_width: features of the products by which they are; the width of the stack if None.
    """

    memory: int = 1
    segment: int = 256
    recall: int = 100
    sensory: Count = 0
    summary: UnitInterval = 0.5
    recall_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory != 1:
            raise ValueError(f"memory={self.memory}; expected 1, as every segment leaves one memory")
        if self.sensory > self.segment:
            raise ValueError(f"sensory={self.sensory}; expected at most segment={self.segment}")
        if not self.half:
            raise ValueError(
                f"summary={self.summary} of {self.segment} tokens is none; expected at least one of them"
            )

    @property
    def half(self) -> int:
        """Tokens of a segment by which memories are recalled."""
        return round(self.summary * self.segment)


@checked_dataclass
class MaskedLanguageModelConfig:
    """Config of a model that gives the logits of the token at each position of a whole sequence.

    Attributes:
      input, stack: see `InputConfig` and `StackConfig`; inputs must be tokens.
      tie_embeddings: whether the output matrix is the embedding matrix.
      final_norm: whether a norm follows the stack, which one with norm_position="post" does not need.
      transform: activation between a linear map of the width and a LayerNorm before the output matrix, as in BERT; None for
        neither of the three.
      transform_epsilon: epsilon of this norm.
    """

    input: InputConfig
    stack: StackConfig
    tie_embeddings: bool = True
    final_norm: bool = True
    transform: str | None = "gelu_erf"
    transform_epsilon: NonNegative = 1e-12

    def __post_init__(self) -> None:
        if self.input.vocab_size is None:
            raise ValueError(
                "a masked language model needs vocab_size; input_size is for classifiers of vectors"
            )
        if self.transform is not None:
            choose("transform", ACTIVATIONS, self.transform)


@checked_dataclass
class ReplacedTokenDetectorConfig:
    """Config of a model that tells of each token of a whole sequence whether a small generator replaced it.

    Attributes:
      input, stack: see `InputConfig` and `StackConfig`; inputs must be tokens. The stack is the discriminator's.
      generator: fields of `StackConfig` in which the generator differs. By default it has a quarter of the width.
      final_norm: whether a norm follows each stack, which ones with norm_position="post" do not need.
      transform: activation between the two maps of each head.
      transform_epsilon: epsilon of the norm in the generator's head.
      detection_weight: factor on the discriminator's loss.
    """

    input: InputConfig
    stack: StackConfig
    generator: Mapping[str, Any] | StackConfig = dataclasses.field(default_factory=dict)
    final_norm: bool = True
    transform: str = "gelu_erf"
    transform_epsilon: NonNegative = 1e-12
    detection_weight: Positive = 50.0

    def __post_init__(self) -> None:
        if self.input.vocab_size is None:
            raise ValueError(
                "a replaced-token detector needs vocab_size; input_size is for classifiers of vectors"
            )
        choose("transform", ACTIVATIONS, self.transform)
        narrow = {"width": max(1, self.stack.width // 4)}
        own = _other_stack("generator", self.stack, narrow, self.generator, same_width=False)
        object.__setattr__(self, "generator", own)


@checked_dataclass
class EncoderDecoderConfig(LanguageModelConfig):
    """Config of a model that gives the logits of the next token of a target, given a source.

    Attributes:
      input, stack: those of the decoder; the encoder embeds its tokens by the same table.
      encoder: fields of `StackConfig` in which the encoder differs from the decoder. By default its mixers see whole sequences if they can.
      cross: options of the cross-attention of each layer of the decoder; a key "mixer" names it ("attention" if left out).
      reading: how the decoder reads a source: by "attention", or as a "prefix", the encoder's outputs as tokens before those of the target.
      deletion: options of a gate by which tokens leave the encoder (`DeletionConfig`, MrT5), whose layers behind it and cross-attentions
        are softmax attention; None for none. Layers of the encoder run without `scan`.
    """

    encoder: Mapping[str, Any] | StackConfig = dataclasses.field(default_factory=dict)
    cross: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reading: Literal["attention", "prefix"] = "attention"
    deletion: Mapping[str, Any] | DeletionConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading == "attention" and self.stack.residual != "separate":
            raise ValueError(f"residual={self.stack.residual!r}; cross-attentions need residual='separate'")
        object.__setattr__(self, "encoder", _other_stack("encoder", self.stack, WHOLE, self.encoder))
        if isinstance(self.deletion, Mapping):
            object.__setattr__(self, "deletion", make_config("deletion", DeletionConfig, self.deletion))
        if self.deletion is not None:
            self._check_deletion()

    def _check_deletion(self) -> None:
        """Raises where tokens of the encoder could not leave."""
        if self.deletion.layer >= self.encoder.depth:
            raise ValueError(
                f"deletion.layer={self.deletion.layer}; expected a layer of the encoder, below its depth={self.encoder.depth}"
            )
        if self.reading == "prefix":
            raise ValueError(
                "reading='prefix' with deletion, whose gates are added to logits of keys; expected reading='attention'"
            )
        for name, plain in {"route": None, "shared": None, "residual": "separate"}.items():
            if (value := getattr(self.encoder, name)) != plain:
                raise ValueError(f"encoder.{name}={value!r} with deletion; expected {plain!r}")


@checked_dataclass
class PointerNetworkConfig:
    """Config of a model that gives the logits of items of a source at each step of a target.

    Attributes:
      input, stack: the embedding of items, and the decoder.
      encoder: fields of `StackConfig` in which the encoder differs from the decoder, as in `EncoderDecoderConfig`; None for a map of each
        item by itself.
      process_steps: steps that read the items as a set before the first one is named (Vinyals et al. 2016, arXiv:1511.06391).
      glimpse: whether the decoder attends to the items before it points.
    """

    input: InputConfig
    stack: StackConfig
    encoder: Mapping[str, Any] | StackConfig | None = dataclasses.field(default_factory=dict)
    process_steps: Count = 0
    glimpse: bool = False

    def __post_init__(self) -> None:
        if self.encoder is not None:
            object.__setattr__(self, "encoder", _other_stack("encoder", self.stack, WHOLE, self.encoder))


def _other_stack(
    name: str, stack: StackConfig, defaults: Mapping[str, Any], given: Any, *, same_width: bool = True
) -> StackConfig:
    """Returns the config of a further stack, from the fields in which it differs, or itself."""
    if not isinstance(given, StackConfig):
        own = {field.name: getattr(stack, field.name) for field in dataclasses.fields(StackConfig)} | defaults
        mixers = {
            **stack.mixer_defaults,
            **defaults.get("mixer_defaults", {}),
            **given.get("mixer_defaults", {}),
        }
        given = make_config(name, StackConfig, own | dict(given) | {"mixer_defaults": mixers})
    if same_width and given.width != stack.width:
        raise ValueError(f"{name}.width={given.width}; expected that of the other stack, {stack.width}")
    return given


@checked_dataclass
class AutoencoderConfig:
    """Config of a model that reconstructs its input from one vector.

    Attributes:
      input, stack: see `InputConfig` and `StackConfig`; inputs must be tokens.
      pooling: vector per row: the output at the "last" real token, or the "mean" over real tokens.
    """

    # Norms stand in the decoder, behind the pooling.
    final_norm: ClassVar[bool] = False

    input: InputConfig
    stack: StackConfig
    pooling: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        if self.input.vocab_size is None:
            raise ValueError("an autoencoder needs vocab_size; input_size is for classifiers of vectors")


@checked_dataclass
class RegressorConfig:
    """Config of a model that gives a vector of real numbers at each position.

    Attributes:
      input, stack: see `InputConfig` and `StackConfig`.
      output_size: o, number of outputs per position.
      causal: whether outputs must not depend on later inputs; then mixers and norms that are not causal are refused.
      final_norm: whether a norm precedes the output matrix.
    """

    input: InputConfig
    stack: StackConfig
    output_size: int
    causal: bool = True
    final_norm: bool = True


ModelConfig = (
    ClassifierConfig
    | DualEncoderConfig
    | LanguageModelConfig
    | EncoderDecoderConfig
    | MaskedLanguageModelConfig
    | ReplacedTokenDetectorConfig
    | AutoencoderConfig
    | RegressorConfig
    | PointerNetworkConfig
    | RecurrentMemoryConfig
    | HierarchicalMemoryConfig
)
KINDS = {
    "classifier": ClassifierConfig,
    "dual_encoder": DualEncoderConfig,
    "encoder_decoder": EncoderDecoderConfig,
    "hierarchical_memory": HierarchicalMemoryConfig,
    "language_model": LanguageModelConfig,
    "masked_language_model": MaskedLanguageModelConfig,
    "autoencoder": AutoencoderConfig,
    "pointer_network": PointerNetworkConfig,
    "recurrent_memory": RecurrentMemoryConfig,
    "regressor": RegressorConfig,
    "replaced_token_detector": ReplacedTokenDetectorConfig,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """Returns the config that a flat mapping with a key "kind" describes.

    Raises:
      ValueError: unknown kind or field (with the nearest name), or inconsistent values.
    """
    values = dict(config)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}{suggestion(kind, KINDS)}; expected one of {sorted(KINDS)}")
    parts = {"input": InputConfig, "stack": StackConfig}
    owners = {field.name: part for part, cls in parts.items() for field in dataclasses.fields(cls)}
    own = {field.name for field in dataclasses.fields(KINDS[kind])} - set(parts)
    for name in values:
        if name not in owners and name not in own:
            raise ValueError(f"model has no field {name!r}{suggestion(name, [*owners, *own])}")
    made = {
        part: make_config("model", cls, {k: v for k, v in values.items() if owners.get(k) == part})
        for part, cls in parts.items()
    }
    return make_config("model", KINDS[kind], {k: v for k, v in values.items() if k in own}, given=made)
