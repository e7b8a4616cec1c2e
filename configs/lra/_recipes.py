"""What the configs of this folder share: a recipe for every mixer and task, by protocol. It is no config.

Protocols never share a column of a table. "s4" is that of S4 and all that came after it: models of about a million
parameters trained for many epochs, pixels as values, characters. "lra" is the one that Long Range Arena was published with: small
Transformers, few steps, pixels as tokens, bytes.

The protocol "s4" has the published recipes of `_published.py`; its Transformers and recurrent models are ours, untuned. The
protocol "lra" has the sizes and rates of the benchmark's own configs, but the mean over tokens for a CLS token, and a sliding
window of 64 for blocks of 64.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

PUBLISHED = runpy.run_path(str(pathlib.Path(__file__).with_name("_published.py")))
# The tables that hold the recipe of a task, and its longest sequence.
TASKS = dict(
    listops=("listops", 2048),
    text=("text", 4096),
    retrieval=("retrieval", 4000),
    image=("image", 1024),
    pathfinder=("pathfinder", 1024),
    pathx=("pathx", 16384),
    path256=("pathx", 65536),
)
ATTENTIONS = ("attention", "local_attention", "linformer", "performer", "linear_attention", "fnet", "wersa")
# Longformer and other sparse patterns, and attention through landmarks and latents.
SPARSE = (
    *("longformer", "bigbird", "etc", "longt5", "nystromformer", "luna", "reformer", "informer"),
    *("shifted_sparse", "moba", "landmark", "power_attention", "strided_attention", "core_context"),
)
# Those of them that take no positions by themselves.
UNPLACED = ("longformer", "bigbird", "nystromformer", "luna", "reformer", "informer")
RECURRENT = ("mamba", "b2s6", "bimamba", "mamba2", "gated_deltanet", "hyena")
MIXERS = {"s4": (*PUBLISHED["MIXERS"], *ATTENTIONS, *SPARSE, *RECURRENT), "lra": ATTENTIONS[:5]}
WARMUP = dict(warmup_epochs=1)

# Long Range Arena (Tay et al. 2021): depth, width, heads, head size, hidden units, dropout. For the images each mixer has its own.
LRA = dict(
    listops=(4, 512, 8, 64, 1024, 0.1), text=(4, 256, 4, 64, 1024, 0.1), retrieval=(4, 128, 4, 32, 512, 0.1)
)
LRA_IMAGES = dict(
    image=dict(
        attention=(1, 128, 8, 8, 128, 0.3),
        local_attention=(1, 128, 2, 32, 128, 0.3),
        linformer=(1, 128, 8, 8, 128, 0.3),
        performer=(1, 128, 8, 8, 128, 0.3),
        linear_attention=(1, 128, 8, 8, 128, 0.3),
    ),
    pathfinder=dict(
        attention=(4, 32, 4, 4, 32, 0.2),
        local_attention=(2, 64, 4, 8, 64, 0.1),
        linformer=(1, 32, 2, 8, 32, 0.2),
        performer=(4, 32, 8, 2, 32, 0.2),
        linear_attention=(1, 128, 2, 32, 128, 0.2),
    ),
    pathx=dict.fromkeys(MIXERS["lra"], (1, 32, 2, 8, 32, 0.1)),
)
# Batch, steps or epochs, learning rate at its peak, warm-up in steps, schedule, weight decay. The rates of the texts are 0.05 /
# sqrt(step); on Retrieval the published warm-up of 8,000 steps is longer than training, which ends at this rate.
LRA_TRAINING = dict(
    listops=(32, dict(steps=5000), 0.05 / 1000**0.5, dict(warmup_steps=1000), "rsqrt", 0.1),
    text=(32, dict(steps=20_000), 0.05 / 8000**0.5, dict(warmup_steps=8000), "rsqrt", 0.1),
    retrieval=(32, dict(steps=5000), 0.05 / 8000**0.5 * 5 / 8, dict(warmup_steps=4999), "rsqrt", 0.1),
    image=(256, dict(epochs=200), 5e-4, WARMUP, "cosine", 0.0),
    pathfinder=(512, dict(epochs=200), 1e-3, WARMUP, "cosine", 0.0),
    pathx=(64, dict(epochs=200), 1e-3, WARMUP, "cosine", 0.0),
)


def parse(file: str, arg: str, **more: str) -> dict:
    """Returns the options of a config's argument.

    Args:
      file: name of the config.
      more: options other than mixer and protocol, with their defaults.

    Raises:
      ValueError: for an option that the config does not have, an unknown protocol, or a mixer without a recipe.
    """
    given = dict(pair.partition("=")[::2] for pair in arg.split(",") if pair)
    options = dict(mixer="s5", protocol="s4", **more) | given
    if unknown := given.keys() - {"mixer", "protocol", *more}:
        forms = ("mixer=NAME", f"protocol={'|'.join(MIXERS)}", *(f"{name}=..." for name in more))
        raise ValueError(f"{file} takes {', '.join(forms)}, not {', '.join(unknown)}")
    mixer, protocol = options["mixer"], options["protocol"]
    if protocol not in MIXERS:
        raise ValueError(f"protocol={protocol!r}; expected {' or '.join(MIXERS)}")
    if mixer not in MIXERS[protocol]:
        available = ", ".join(sorted(MIXERS[protocol]))
        raise ValueError(
            f"mixer={mixer!r} has no recipe of the protocol {protocol!r}; available: {available}"
        )
    return options


def config(name: str, mixer: str, protocol: str, *, task: dict, data: dict, **model: object) -> ConfigDict:
    """Returns the config of a mixer on a task.

    Args:
      name: key of `TASKS`.
      task, data: these sections.
      model: fields of the model besides those of the recipe.
    """
    if protocol == "lra":
        recipe = transformers(*TASKS[name], mixer)
    else:
        published = PUBLISHED["MIXERS"].get(mixer)
        recipe = published(*TASKS[name]) if published else ours(*TASKS[name], mixer)
    made = ConfigDict()
    made.seed = 0
    made.task = task
    made.data = data
    made.model = dict(kind="classifier", dtype="float32", pattern=(mixer,)) | recipe["model"] | model
    made.train = recipe["train"] | dict(protocol=protocol)
    made.optimizer = recipe["optimizer"]
    return made


def mixer_options(mixer: str, length: int, heads: int = 8, head_dim: int | None = None) -> dict:
    """Returns the entry of `model.mixers` of a mixer that has no recipe of its own."""
    size = {} if head_dim is None else dict(head_dim=head_dim)
    return dict(
        attention=dict(heads=heads, causal=False) | size,
        local_attention=dict(mixer="attention", heads=heads, causal=False, window=64) | size,
        linformer=dict(heads=heads, max_length=length, projected=256 if length <= 4096 else 64),
        performer=dict(heads=heads, causal=False) | size,
        linear_attention=dict(heads=heads, causal=False) | size,
        fnet=dict(),
        wersa=dict(heads=heads),
        longformer=dict(heads=heads, window=256),
        bigbird=dict(heads=heads, block=64),
        etc=dict(heads=heads, global_tokens=16),
        longt5=dict(heads=heads),
        nystromformer=dict(heads=heads, landmarks=128),
        luna=dict(heads=heads, latents=128),
        reformer=dict(heads=heads, chunk=64, buckets=2 * length // 64, rounds=2),
        informer=dict(heads=heads),
        shifted_sparse=dict(heads=heads, group=length // 4),
        moba=dict(heads=heads, block=max(16, length // 32), top_k=4),
        landmark=dict(heads=heads, block=51),
        power_attention=dict(heads=heads, block=max(16, length // 64)),
        strided_attention=dict(heads=heads, block=max(16, length // 64)),
        core_context=dict(heads=heads, near=length // 8),
        mamba=dict(),
        b2s6=dict(),
        bimamba=dict(mixer="bidirectional", inner="mamba", tied="projections"),
        mamba2=dict(head_dim=32, state_size=64),
        gated_deltanet=dict(heads=heads),
        hyena=dict(max_length=length),
    )[mixer]


def ours(task: str, length: int, mixer: str) -> dict:
    """Transformers of the width of S5's recipe, and recurrent models of its width and depth; batches and epochs are S5's."""
    depth, width, *_ = PUBLISHED["S5"][task]
    if mixer in (*ATTENTIONS, *SPARSE):
        body = dict(depth=4, channel="mlp", norm="layer_norm", dropout=0.1)
        if mixer in UNPLACED:
            body |= dict(absolute_positions="sinusoidal")
        optimizer = dict(learning_rate=5e-4, weight_decay=0.1, clip_norm=1.0)
    else:
        body = dict(depth=depth, channel="none", norm="rms_norm", dropout=0.1)
        optimizer = dict(learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0)
    batch, epochs = PUBLISHED["S5"][task][4:6]
    return dict(
        model=body | dict(width=width, mixers={mixer: mixer_options(mixer, length)}),
        train=dict(batch_size=batch, epochs=epochs),
        optimizer=optimizer | WARMUP,
    )


def transformers(task: str, length: int, mixer: str) -> dict:
    """The protocol "lra"."""
    sizes = LRA.get(task) or LRA_IMAGES[task][mixer]
    depth, width, heads, head_dim, hidden, dropout = sizes
    learned = dict(absolute_positions="learned", max_positions=length)
    options = mixer_options(mixer, length, heads, head_dim)
    if options.get("mixer", mixer) == "attention":
        options |= dict(position="none")
    if mixer == "linformer":
        options |= dict(projected=32)
    batch, duration, rate, warmup, schedule, decay = LRA_TRAINING[task]
    model = dict(
        depth=depth,
        width=width,
        mixers={mixer: options},
        channel="mlp",
        channels={"mlp": dict(hidden=hidden)},
        norm="layer_norm",
        dropout=dropout,
        **(learned if task in ("image", "pathx") else dict(absolute_positions="sinusoidal")),
    )
    optimizer = dict(
        learning_rate=rate, weight_decay=decay, schedule=schedule, b2=0.98, epsilon=1e-9, **warmup
    )
    if task == "pathx":
        optimizer |= dict(clip_norm=1.0)
    return dict(model=model, train=dict(batch_size=batch, **duration), optimizer=optimizer)
