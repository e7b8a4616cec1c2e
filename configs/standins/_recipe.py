"""What the configs of the stand-ins share: their options, and one untuned recipe for any mixer."""

from ml_collections import ConfigDict

NUMBERS = dict(width=96, depth=4, learning_rate=3e-3)
# State space models and convolutions without an output map: as published, a gated one follows in the same branch.
BARE = ("dss", "liquid_s4", "lru", "s4", "s4d", "s4nd", "s5", "sgconv")


def parse(file: str, arg: str, **own: int | str) -> dict:
    """Returns the options "name=value,..." of a config file: mixer, width, depth, learning_rate, and its own with their defaults.

    Raises:
      ValueError: an option is unknown, or no number where its default is one.
    """
    options = dict(mixer="s5") | NUMBERS | own
    for pair in filter(None, arg.split(",")):
        name, _, value = pair.partition("=")
        if name not in options:
            raise ValueError(f"{file} takes {', '.join(options)}, not {name}")
        try:
            options[name] = type(options[name])(value)
        except ValueError:
            raise ValueError(f"{name}={value!r}; expected a number, such as {options[name]}") from None
    return options


def stand_in(
    options: dict, *, task: dict, kind: str, length: int, batch_size: int, **mixer_options: object
) -> ConfigDict:
    """Returns the config of a model of this kind on the task, with the options of `parse`, and further ones of its mixer."""
    mixer = options["mixer"]
    body = dict(channel="mlp", norm="layer_norm")
    if mixer in BARE:
        body = dict(channel="half_glu1", residual="joint", norm="batch_norm")
    own = dict(mega=dict(max_length=None), rwkv6=dict(head_dim=options["width"] // 4))
    own["rwkv7"] = own["rwkv6"]
    given = dict(mixer_options) | own.get(mixer, {})
    config = ConfigDict()
    config.seed = 0
    config.task = task
    config.model = dict(
        kind=kind,
        width=options["width"],
        depth=options["depth"],
        pattern=(mixer,),
        mixers={mixer: given} if given else {},
        mixer_defaults=dict(heads=4, causal=False, bidirectional=True, max_length=length),
        dropout=0.1,
        **body,
    )
    config.data = {}
    config.train = dict(batch_size=batch_size, epochs=options["epochs"])
    config.optimizer = dict(
        learning_rate=options["learning_rate"], weight_decay=0.05, warmup_epochs=1, clip_norm=1.0
    )
    return config
