"""The hybrids: each is built as its config says, with the mixers and channel mixers of its paper in their order."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.config.loading import DataConfig, TrainConfig, section, to_plain
from experiments.training.model import SplitModel
from experiments.training.optimizers import OptimizerConfig, assign_groups
from layers.mixers.attention.attention import Attention
from layers.positions import Rotary
from layers.positions.position import NoPosition
from seqmodels import build_model

PATH = pathlib.Path(__file__).resolve().parents[2] / "configs" / "hybrids.py"
CONFIGS = runpy.run_path(str(PATH))

# A layer is its mixer and its channel mixer: G a gated MLP, E experts, P a plain MLP, - none.
PATTERNS = {
    "jamba": "Mamba:G Mamba:E Mamba:G Mamba:E Attention:G Mamba:E Mamba:G Mamba:E",
    "hunyuan_turbos": "Attention:- Mamba2:E Mamba2:E Mamba2:E Mamba2:E",
    "samba": "Mamba:G Attention:G Mamba:G Attention:G",
    "griffin": "RGLRU:G RGLRU:G Attention:G RGLRU:G RGLRU:G Attention:G",
    "minimax": "LightningAttention:E " * 7 + "Attention:E",
    "kimi_linear": "KDA:G KDA:E KDA:E MLA:E",
    "kimi_gated": "KDA:G KDA:E KDA:E MLA:E",
    "qwen3_next": "GatedDeltaNet:E GatedDeltaNet:E GatedDeltaNet:E GatedAttention:E",
    "hybridna": "Mamba2:G " * 7 + "Attention:G",
    "masformer": "Attention:P Attention:P Attention:P Attention:P",
    "longgen": "Attention:G " * 6,
    "longgen_blocks": "StridedAttention:G " * 2 + "Attention:G " * 2 + "StridedAttention:G " * 2,
    "xlstm": "MLSTM:- SLSTM:G " + "MLSTM:- " * 6,
    "lfm2": "GatedShortConv:G GatedShortConv:G Attention:G " * 3
    + "GatedShortConv:G Attention:G " * 3
    + "GatedShortConv:G",
    "falcon_h1": "Parallel:G " * 4,
    "nemotron_h": "Mamba2:P " * 4 + "Mamba2:- Attention:P",
    "zamba2": "Mamba2:- " * 9,
    "based": "Based:G Attention:G Based:G Attention:G",
    "sse_h": "SSE:G SSE:G SSE:G Attention:G",
}
# Those that default tests do not build.
SLOW = (
    "longgen",
    "longgen_blocks",
    "xlstm",
    "lfm2",
    "falcon_h1",
    "nemotron_h",
    "zamba2",
    "based",
    "sse_h",
    "kimi_gated",
)
by_hybrid = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PATTERNS]
)
LETTERS = {"GLU": "G", "GEGLU": "G", "MoE": "E", "MLP": "P", "NoneType": "-"}


@functools.cache
def config_of(name):
    return to_plain(CONFIGS["get_config"](f"mixer={name}"))


@functools.cache
def model_of(name):
    sizes = {"vocab_size": 18, "num_classes": 10}
    return build_model(config_of(name)["model"] | sizes, rngs=nnx.Rngs(0))


def attention_of(name):
    """The first layer of attention."""
    return next(b.mixer for b in model_of(name).stack.layers if isinstance(b.mixer, Attention))


def test_every_hybrid_is_listed_here():
    assert set(PATTERNS) == set(CONFIGS["MODELS"])


@pytest.mark.sample(3)
@by_hybrid
def test_layers_and_shapes(name):
    model = model_of(name)
    layers = [
        f"{type(block.mixer).__name__}:{LETTERS[type(block.channel).__name__]}"
        for block in model.stack.layers
    ]
    assert layers == PATTERNS[name].split()
    tokens = jnp.ones((2, 24), jnp.int32)
    logits = jax.eval_shape(lambda: model(tokens, segment_ids=tokens)[0])
    assert logits.shape == (2, 10)
    assert model.stack.causal


@by_hybrid
def test_every_section_of_the_config_holds(name):
    config = config_of(name)
    section(config, "train", TrainConfig)
    section(config, "data", DataConfig)
    optimizer = section(config, "optimizer", OptimizerConfig)
    values = config["model"] | {"vocab_size": 18, "num_classes": 10}
    parameters = SplitModel(lambda rngs: build_model(values, rngs=rngs)).parameters
    assign_groups(optimizer, {path: declaration.group for path, declaration in parameters.items()})


def test_positions_and_windows_are_the_papers():
    assert isinstance(attention_of("jamba").config.position, NoPosition)
    assert isinstance(model_of("kimi_linear").stack.layers[3].mixer.config.position, NoPosition)
    for name in ("griffin", "minimax"):
        assert attention_of(name).config.position.fraction == 0.5
    assert attention_of("qwen3_next").config.position == Rotary(fraction=0.25)
    assert attention_of("griffin").config.groups == 1
    assert attention_of("griffin").config.window == attention_of("samba").config.window == 64
    windows = [block.mixer.config.window for block in model_of("masformer").stack.layers]
    assert windows == [None, 32, 32, 32]


@pytest.mark.slow
def test_longgen_keeps_all_keys_in_a_third_of_its_layers():
    """Bytes of the cache are those of a third of the layers and of as many slots as windows and first tokens have in the others."""
    state = jax.eval_shape(lambda: model_of("longgen").stack.init_state(1, max_length=3200))
    slots = [leaf.shape[1] for leaf in jax.tree.leaves(state) if leaf.ndim == 4]
    assert slots == [36] * 4 + [3200] * 4 + [36] * 4


@pytest.mark.slow
def test_zamba2_shares_two_blocks_in_turn():
    model = model_of("zamba2")
    assert len(model.stack.shared) == 2
    users = [number for number, block in enumerate(model.stack.layers) if block.use is not None]
    assert users == [2, 5, 8]
    assert [model.config.stack.shared.block_of(layer) for layer in users] == [0, 1, 0]
    first, second = model.stack.layers[2].use, model.stack.layers[8].use
    assert first.adapters[0].a is not second.adapters[0].a


@pytest.mark.slow
def test_kimi_gated_bounds_decays_and_gates_by_whole_matrices():
    kda, *_, latent = (block.mixer for block in model_of("kimi_gated").stack.layers)
    assert kda.decay.lowest == -5.0
    assert kda.gate.kernel.shape == latent.gate.kernel.shape == (64, 64)
    assert isinstance(latent.config.position, NoPosition)


def test_jamba_norms_what_selects():
    assert model_of("jamba").stack.layers[0].mixer.inner_norms is not None
    assert model_of("samba").stack.layers[0].mixer.inner_norms is None


def test_routers_are_the_papers():
    names = [name for name in PATTERNS if "E" in PATTERNS[name] and name not in SLOW]
    routers = {name: model_of(name).stack.layers[-1].channel.config for name in names}
    kimi = routers.pop("kimi_linear")
    assert (kimi.scores, kimi.scale, kimi.bias_rate, kimi.balance) == ("sigmoid", 2.446, 0.001, 0.0)
    assert all((r.scores, r.bias_rate) == ("softmax", 0.0) and r.balance > 0 for r in routers.values())
    assert [name for name, router in routers.items() if router.shared_gate] == ["qwen3_next"]


def test_an_unknown_hybrid_is_refused():
    with pytest.raises(ValueError, match="mixer='sambo' is no hybrid here; available: jamba"):
        CONFIGS["get_config"]("mixer=sambo")
    with pytest.raises(ValueError, match="takes mixer=NAME, not depth"):
        CONFIGS["get_config"]("mixer=samba,depth=3")
