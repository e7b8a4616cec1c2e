"""The config of tests.experiments.tiny, with every field that tests override on the command line."""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="tiny", slow=0.0, data_seed=0)
    config.model = dict(dropout=0.2)
    config.optimizer = dict(learning_rate=0.05, weight_decay=0.1, warmup_steps=3, clip_norm=1.0, ema=0.9)
    config.train = dict(batch_size=8, epochs=4, log_every=1, checkpoint_every=4, tensorboard=False)
    config.data = dict(bucket_bounds=(4, 8), prefetch=1)
    return config
