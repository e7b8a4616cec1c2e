"""The config of a stack of blocks."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from layers.channel import CHANNEL_MIXERS
from layers.mixers import MIXERS
from layers.options import Bound, Count, DtypeNames, Fraction, Positive, checked_dataclass
from layers.registry import make_config, suggestion
from seqmodels.shared_config import SharedConfig

# Options of mixers that a block fills in.
SUPPLIED = {"width", "dtype", "layer", "depth"}


@checked_dataclass
class StackConfig:
    """The body of a model: `depth` blocks whose kinds cycle through `pattern`.

    Attributes:
      width: d, number of features of the residual stream.
      depth: number of blocks.
      pattern: kinds of blocks, repeated over the depth: "mixer", or "mixer+channel" to name the channel mixer of that
        block, or "mixer+none" for a block without one. A mixer is a registered name or a key of `mixers`.
      mixers: options of mixers by their names in the pattern. With a key "mixer" the name is an alias, so that one model
        can hold, for example, two attentions with different windows.
      mixer_defaults: options of every mixer that has them and is not given others in `mixers`, such as {"heads": 2}, so
        that mixers can be exchanged by name. Mixers without these options ignore them; one that no mixer has is refused.
      channel: channel mixer of blocks that name none; "none" for no channel mixer.
      channels: options of channel mixers by their names; an alias has a key "channel".
      residual: "separate": x + mixer, then x + channel mixer; "joint": x + channel(mixer(x)), as in S4, S5 and LRU;
        "parallel": x + mixer(norm(x)) + channel(norm(x)), each with its own norm, as in GPT-NeoX; "reversible": two streams in
        float32, x_1 + mixer(norm(x_2)), then x_2 + channel(norm(x_1)), both of which begin as the input and whose mean is the output
        (Gomez et al. 2017, arXiv:1707.04585; Reformer, arXiv:2001.04451). The backward pass computes the inputs of layers from their
        outputs, so that memory does not grow with the depth.
      shared_norm: whether the branches of "parallel" share one norm of their input (Falcon, GPT-J).
      norm, norm_options: name of the norm and its options.
      norm_position: "pre" normalizes the input of each branch, "post" the sum, "output" the output of each branch (OLMo 2),
        "both" its input and its output (Gemma 2), and "stream" x itself before each branch, so that what the branch is added to
        is normalized too (MiniMax).
      residual_scale: factor on x before a branch is added; DeepNorm (Wang et al. 2022, arXiv:2203.00555) uses (2
        depth)^(1/4) with norm_position="post".
      branch_scale: factor on the output of each branch before it is added (Granite).
      shared: options of blocks that several layers share (`SharedConfig`), whose output the mixers of these layers read beside
        x: x + mixer(norm(x + shared(x, x_0))), with x_0 the input of the stack (Zamba2); None for none. Layers run without `scan`.
      route: the layers, from one up to but without another, that some tokens pass by in training, drawn anew in every step (TREAD,
        Krause et al. 2025, arXiv:2501.04765, which has (2, 8) of 12); None for none. They rejoin as they were, and inference has no
        route. The others keep their order, and in `attention` their positions. Layers run without `scan`.
      route_rate: the part of the tokens that pass them by.
      stretch: in training, tokens have positions as in sequences up to this many times as long, drawn in order for every row and step
        (see `seqmodels.stretching`), in mixers that take positions with gaps, such as `attention`; CLEX has the largest of its
        factors. 1 for the true positions, which inference always has. Layers run without `scan`.
      base_width: width of the model whose learning rates and initial values carry over by muP (`seqmodels.width_transfer`), or None.
      dropout: dropout rate of branch outputs if separate; passed to the channel mixer if joint.
      scan: whether repeats of the pattern run under `jax.lax.scan`, which compiles them once.
      remat: what the backward pass recomputes: "none", "full" (every block), "dots" (all but matrix products), "attention" (all
        but the results of attention, which take longest to compute again, and states that pass between devices that share a
        row; see `layers.kernels.kept`). Under `scan`, "none" recomputes elementwise operations, which costs less than writing
        their results for every layer.
      dtype: dtype of the activations.
      param_dtype: dtype of stored matrices of the default optimizer group, "float32" or "bfloat16"; all other parameters
        are float32.
    """

    width: int
    depth: int
    pattern: tuple[str, ...]
    mixers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    mixer_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channel: str = "swiglu"
    channels: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    residual: Literal["separate", "joint", "parallel", "reversible"] = "separate"
    shared_norm: bool = False
    norm: str = "rms_norm"
    norm_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norm_position: Literal["pre", "post", "output", "both", "stream"] = "pre"
    residual_scale: Positive = 1.0
    branch_scale: Positive = 1.0
    shared: Mapping[str, Any] | SharedConfig | None = None
    route: tuple[Count, Count] | None = None
    route_rate: Fraction = 0.5
    stretch: Annotated[int, Bound(least=1)] = 1
    base_width: int | None = None
    dropout: Fraction = 0.0
    scan: bool = True
    remat: Literal["none", "full", "dots", "attention"] = "none"
    dtype: Annotated[Any, DtypeNames(("float32", "bfloat16", "float16"))] = "float32"
    param_dtype: Annotated[Any, DtypeNames(("float32", "bfloat16"))] = "float32"

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ValueError(f"pattern={self.pattern!r}; expected a tuple of names such as ('s5',)")
        for entry in self.pattern:
            if not all(entry.split("+")) or entry.count("+") > 1:
                raise ValueError(f"pattern has {entry!r}; expected MIXER, MIXER+CHANNEL or MIXER+none")
        used = {entry.partition("+")[0] for entry in self.pattern}
        _all_used("mixers", self.mixers, used)
        self._check_defaults()
        self._check_shared()
        _all_used(
            "channels", self.channels, {entry.partition("+")[2] or self.channel for entry in self.pattern}
        )
        bare = any(self.channel_of(i) is None for i in range(len(self.pattern)))
        if self.residual in ("joint", "reversible") and bare:
            raise ValueError(
                f"residual={self.residual!r} needs a channel mixer in every block; use residual='separate' with 'none'"
            )
        if self.residual == "reversible":
            self._check_reversible()
        if self.shared_norm and (self.residual != "parallel" or self.norm_position == "output"):
            raise ValueError(
                f"shared_norm=True with residual={self.residual!r} and norm_position={self.norm_position!r}; only branches "
                "side by side, residual='parallel', with norms before them can share one"
            )
        if self.residual == "parallel" and self.norm_position in ("post", "stream"):
            raise ValueError(
                f"residual='parallel' adds both branches at once; norm_position={self.norm_position!r} needs 'separate'"
            )
        if self.route is not None and not self.route[0] < self.route[1] <= self.depth:
            raise ValueError(
                f"route={self.route}; expected two layers in order, the second at most depth={self.depth}"
            )
        if self.route is None and self.route_rate != type(self).route_rate:
            raise ValueError(
                f"route_rate={self.route_rate} has no effect without route; expected route=(start, end) too"
            )
        if self.route is not None and self.shared is not None:
            raise ValueError(
                "route is given, and shared blocks, which read all tokens; expected one of the two"
            )

        if self.stretch > 1 and self.shared is not None:
            raise ValueError(
                f"stretch={self.stretch}, and shared blocks, whose positions are the true ones; expected one of the two"
            )

    def _check_reversible(self) -> None:
        """Raises where a layer could not be undone, or would be run in another way."""
        plain = {
            "norm_position": "pre",
            "residual_scale": 1.0,
            "branch_scale": 1.0,
            "shared": None,
            "route": None,
            "stretch": 1,
            "remat": "none",
        }
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with residual='reversible'; expected {value!r}"
                )

    def _check_shared(self) -> None:
        """Makes `shared` a config, and raises unless its layers exist."""
        if isinstance(self.shared, Mapping):
            object.__setattr__(self, "shared", make_config("shared", SharedConfig, self.shared))
        if self.shared is not None and self.shared.layers[-1] >= self.depth:
            raise ValueError(f"shared.layers={self.shared.layers}; expected numbers below depth={self.depth}")

    def _check_defaults(self) -> None:
        """Raises unless each key of `mixer_defaults` is an option of some mixer that the model does not supply."""
        options = {name: set(_options(config)) for name, (config, _) in MIXERS.items()}
        names = [self.mixer_of(layer)[0] for layer in range(len(self.pattern))]
        own = set().union(*(options.get(name, set()) for name in names)) - SUPPLIED
        every = set().union(*options.values()) - SUPPLIED
        for key in self.mixer_defaults:
            if key in SUPPLIED:
                raise ValueError(f"mixer_defaults has {key!r}, which the model supplies to every mixer")
            if key not in every:
                raise ValueError(
                    f"mixer_defaults has {key!r}{suggestion(key, own) or suggestion(key, every)}; no mixer has such an option; "
                    f"options of {', '.join(dict.fromkeys(names))}: {', '.join(sorted(own)) or 'none'}"
                )

    def mixer_of(self, layer: int) -> tuple[str, dict[str, Any]]:
        """Returns the registered name and the options of the mixer of a layer."""
        name = self.pattern[layer % len(self.pattern)].partition("+")[0]
        options = dict(self.mixers.get(name, {}))
        return options.pop("mixer", name), options

    def channel_of(self, layer: int) -> tuple[str, dict[str, Any]] | None:
        """Returns the registered name and the options of the channel mixer of a layer, or None."""
        name = self.pattern[layer % len(self.pattern)].partition("+")[2] or self.channel
        if name == "none":
            return None
        options = dict(self.channels.get(name, {}))
        return options.pop("channel", name), options


def _options(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _all_used(name: str, options: Mapping[str, Any], used: set[str]) -> None:
    """Raises ValueError if `options` has a name that the pattern does not use, or the pattern one that nobody knows."""
    known = {"mixers": MIXERS, "channels": CHANNEL_MIXERS}[name].keys() | options.keys() | {"none"}
    for key in options:
        if key not in used:
            for other in sorted(used - known):
                raise ValueError(
                    f"pattern={other!r} is unknown{suggestion(other, known)}; {name} has options for {key!r}"
                )
            raise ValueError(
                f"{name} has options for {key!r}{suggestion(key, used)}, which the pattern does not use; it uses "
                f"{', '.join(sorted(used))}"
            )
