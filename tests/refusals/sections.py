"""Sections of configs, tasks, data, optimizers, meshes, checkpoints and run directories, used from Python."""

import json
import tempfile
from pathlib import Path

import numpy as np

from experiments.config.command_line import load
from experiments.config.fields import FieldError, set_field
from experiments.config.loading import DataConfig, MeshConfig, TrainConfig, section, to_plain
from experiments.data import bucketing, cache, listops, pipeline
from experiments.data.listops import ListOpsConfig
from experiments.data.sequences import Sequences
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.directory import RunDirectory
from experiments.tasks import make_task
from experiments.training.distillation import DistillConfig
from experiments.training.optimizers import OptimizerConfig
from experiments.training.teacher import Source, check_teacher

PLAIN = dict(seed=0, task={}, model={}, optimizer={}, train={})
RATE = {"learning_rate": 1e-3}
SIZES = {"train": 8, "validation": 4, "test": 4}
LENGTHS = np.array([3, 5, 4])


def plain(**sections):
    return lambda: to_plain(PLAIN | sections)


def made(name, config_class, /, **values):
    return lambda: section({name: values}, name, config_class)


def train(**values):
    return made("train", TrainConfig, **dict(batch_size=4, steps=2) | values)


def distill(**values):
    return made("distill", DistillConfig, teacher="a", **values)


def taught(kind="language_model", **options):
    """The check of a teacher for a student that is a language model of one layer."""
    model = dict(
        kind="language_model", vocab_size=5, width=8, depth=1, pattern=("gla",), mixer_defaults=dict(heads=2)
    )

    def run():
        config = DistillConfig(teacher="a", hidden=1.0)
        source = Source(model | dict(kind=kind) | options, dict)
        mqar = make_task("mqar", **SIZES, vocab_size=5, length=4, pairs=1)
        check_teacher(config, source, model, mqar, dict(inputs=np.zeros((1, 4), np.int32)))

    return run


def optimizer(**values):
    return made("optimizer", OptimizerConfig, **RATE | values)


def mesh(**values):
    return made("mesh", MeshConfig, **values)


def devices(count=None, **values):
    return lambda: Devices.first(count, MeshConfig(**values))


def task(name, **options):
    return lambda: make_task(name, **SIZES | options)


def generated(**values):
    return lambda: ListOpsConfig(**values)


def batches(**values):
    source = Sequences(np.arange(1, 13), np.array([0, 3, 8, 12]), np.array([0, 1, 2]))
    return lambda: pipeline.train_iterator(source, **dict(batch_size=2, seed=0, num_steps=2) | values)


def opened(use, content=None):
    """A use of a folder that holds these files, by name."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (content or {}).items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            use(Path(folder))

    return run


def with_checkpoints(use):
    def run(folder):
        with Checkpoints(folder) as checkpoints:
            use(checkpoints)

    return opened(run)


RECIPE = cache.Recipe("toy", 1, {}, ("<pad>", "a"), "rebuild")
MANIFEST = RECIPE.manifest() | {"splits": {}, "content_sha256": "0"}


def cached(**files):
    """A load of a data set whose folder holds these files."""
    names = {name.replace("__", "."): text for name, text in files.items()}
    return opened(lambda folder: cache.load(RECIPE, folder), names)


CONFIGS = [
    (plain(seed="0"), ValueError, "config.seed='0'; expected an integer from 0"),
    (plain(seed=True), ValueError, "config.seed=True; expected an integer from 0"),
    (plain(sed=1), ValueError, "config has an unknown section 'sed'; did you mean 'seed'?"),
    (plain(train=[1]), TypeError, "config.train=(1,); expected a dict"),
    (plain(task={1: 2}), TypeError, "config.task has the key 1; keys must be strings"),
    (plain(model={"width": object}), TypeError, "config.model.width=<class 'object'> is a type"),
    (plain(model={"width": np.int64(8)}), TypeError, "config.model.width=np.int64(8) is a int64"),
    (plain(model={"dropout": float("inf")}), ValueError, "config.model.dropout=inf; numbers must be finite"),
    (lambda: to_plain(dict(seed=0)), ValueError, "config has no 'task'; sections:"),
    (lambda: load("no/such.py"), ValueError, "there is no file no/such.py"),
    (lambda: set_field(to_plain(PLAIN), "train.bach_size", "3"), FieldError, "did you mean 'batch_size'?"),
    (train(batch_size=2.0), TypeError, "train.batch_size=2.0; expected an integer"),
    (train(batch_size="8"), TypeError, "train.batch_size='8'; expected an integer"),
    (train(batch_size=True), TypeError, "train.batch_size=True; expected an integer"),
    (
        train(lora={"rank": 4}),
        ValueError,
        "without train.pretrained; expected the folder of a published checkpoint too",
    ),
    (train(lora=8), TypeError, "train.lora=8; expected"),
    (
        train(distill={"teacher": "a"}, pretrained="b"),
        ValueError,
        "train.pretrained='b' with train.distill; expected the folder as train.distill.start",
    ),
    (distill(logits=0.0), ValueError, "leave nothing to distill; expected one of them above 0"),
    (distill(temperature=0.0), ValueError, "train.distill.temperature=0.0; expected"),
    (distill(divergence="backward"), ValueError, "train.distill.divergence='backward'; expected"),
    (
        taught("classifier", num_classes=2),
        ValueError,
        "expected a teacher of the same vocabulary or classes",
    ),
    (
        taught("regressor", output_size=2),
        ValueError,
        "kind='regressor'; distillation is for language_model and classifier",
    ),
    (taught(depth=2), ValueError, "depth and width (1, 8) and the teacher (2, 8); expected the same"),
    (taught(route=(0, 1)), ValueError, "reads all tokens of one stream after each layer; expected"),
    (train(steps=-3), ValueError, "train.steps=-3; expected"),
    (train(tensorboard="yes"), TypeError, "train.tensorboard='yes'; expected True or False"),
    (train(eval_every="1"), TypeError, "train.eval_every='1'; expected a number"),
    (train(learning_rate=1), ValueError, "config.train has no option 'learning_rate'"),
    (made("train", TrainConfig, steps=3), ValueError, "config.train needs the option batch_size"),
    (made("data", DataConfig, prefetch=1.5), TypeError, "data.prefetch=1.5; expected an integer"),
    (
        made("data", DataConfig, bucket=3),
        ValueError,
        "config.data has no option 'bucket'; did you mean 'bucket_bounds'?",
    ),
    (made("optimizer", OptimizerConfig), ValueError, "config.optimizer needs the option learning_rate"),
    (optimizer(learning_rate="fast"), TypeError, "optimizer.learning_rate='fast'; expected a number"),
    (
        optimizer(learning_rate=float("nan")),
        ValueError,
        "optimizer.learning_rate=nan; expected a number above 0",
    ),
    (optimizer(name="AdamW"), ValueError, "optimizer.name='AdamW'"),
    (optimizer(b1=1.0), ValueError, "optimizer.b1=1.0; expected"),
    (optimizer(b2=-0.1), ValueError, "optimizer.b2=-0.1; expected"),
    (optimizer(epsilon=0.0), ValueError, "optimizer.epsilon=0.0; expected a number above 0"),
    (optimizer(decay_fraction=0.0), ValueError, "optimizer.decay_fraction=0.0; expected"),
    (optimizer(final_learning_rate=2.0), ValueError, "optimizer.final_learning_rate=2.0; expected"),
    (optimizer(muon_momentum=1.0), ValueError, "optimizer.muon_momentum=1.0; expected"),
    (optimizer(warmup_steps=1.5), TypeError, "optimizer.warmup_steps=1.5; expected an integer"),
    (optimizer(warmup_epochs=-1), ValueError, "optimizer.warmup_epochs=-1; expected"),
    (
        optimizer(groups={"default": RATE}),
        ValueError,
        "set optimizer.learning_rate and optimizer.weight_decay themselves",
    ),
    (optimizer(groups={"ssm": {}}), ValueError, "optimizer.groups['ssm']={}; expected a dict"),
    (
        optimizer(groups={"ssm": 3}),
        TypeError,
        "optimizer.groups={'ssm': 3}; expected a dict, each entry a dict",
    ),
    (
        optimizer(groups={"ssm": {"weight_decay": -1}}),
        ValueError,
        "optimizer.groups['ssm'].weight_decay=-1; expected",
    ),
]
MESHES = [
    (mesh(fsdp=0), ValueError, "mesh.fsdp=0; expected"),
    (mesh(tensor=2.0), TypeError, "mesh.tensor=2.0; expected an integer"),
    (mesh(model=2), ValueError, "config.mesh has no option 'model'"),
    (mesh(fsdp=-1, expert=-1), ValueError, "mesh.fsdp and mesh.expert are -1"),
    (devices(tensor=3), ValueError, "mesh: tensor=3"),
    (devices(4, fsdp=8), ValueError, "there are 4; use smaller axes"),
    (devices(0), ValueError, "num_devices=0; JAX sees 8"),
    (devices(9), ValueError, "num_devices=9; JAX sees 8"),
    (
        lambda: Devices.first(3).check_rows("train.batch_size", 8),
        ValueError,
        "train.batch_size=8 cannot be divided over 3",
    ),
    (
        lambda: Devices.first(8, MeshConfig(sequence=8)).check_time("a training batch", 10),
        ValueError,
        "a training batch of 10 tokens cannot be divided over the mesh axis sequence=8; use 8 or 16",
    ),
    (mesh(method="star"), ValueError, "mesh.method='star'; expected"),
]
TASKS = [
    (task("mqarr"), ValueError, "unknown task 'mqarr'; did you mean 'mqar'?"),
    (task("mqar", lenght=8), ValueError, "task 'mqar' has no option 'lenght'; did you mean 'length'?"),
    (task("mqar", pairs=99), ValueError, "the length must be even and 4 pairs or more"),
    (task("mqar", train=-1), ValueError, "train=-1; expected"),
    (task("mqar", random_filler="no"), TypeError, "random_filler='no'; expected True or False"),
    (task("mqar", extrapolate=((64,),)), ValueError, "extrapolate=((64,),); expected a tuple"),
    (task("parity", running=1), TypeError, "running=1; expected True or False"),
    (task("sorting", lengths=5), TypeError, "lengths=5; expected a tuple of 2 integers"),
    (task("regular_languages", letters=40), ValueError, "letters=40; expected at least 4 and at most 31"),
    (task("copy", seed=1.5), TypeError, "seed=1.5; expected an integer"),
    (
        lambda: make_task("imdb", official_dir=3),
        TypeError,
        "task.official_dir=3; expected the path of a folder",
    ),
    (
        lambda: make_task("imdb", tfds_dir=True),
        TypeError,
        "task.tfds_dir=True; expected the path of a folder",
    ),
    (lambda: make_task("mnist", data_dir=[]), TypeError, "task.data_dir=[]; expected the path of a folder"),
    (
        lambda: make_task("package_text", data_dir=0),
        TypeError,
        "task.data_dir=0; expected the path of a folder",
    ),
    (lambda: make_task("listops", preset="long"), ValueError, "unknown ListOps preset 'long'"),
    (
        lambda: make_task("listops", preset="short", official_dir="."),
        ValueError,
        "leave out one or the other",
    ),
    (generated(max_args=1), ValueError, "max_args must be at least 2, got 1"),
    (generated(max_depth=0), ValueError, "max_depth must be at least 1, got 0"),
    (generated(seed="0"), TypeError, "seed must be an integer, got '0'"),
    (generated(test=0), ValueError, "test must be at least 1, got 0"),
    (generated(min_length=100, max_length=101), ValueError, "raise max_length to 102"),
    (lambda: listops.encode("[MAX 4 nine ]"), ValueError, "'nine' is not a ListOps token"),
    (lambda: listops.evaluate(listops.encode("[MAX 4 9")), ValueError, "not one complete expression"),
    (lambda: listops.evaluate(listops.encode("4 9")), ValueError, "not one complete expression"),
    (lambda: listops.evaluate(listops.encode("[MAX ]")), ValueError, "cannot stand there"),
]
DATA = [
    (
        lambda: Sequences(np.ones(3), np.array([0, 3]), np.array([1])),
        TypeError,
        "tokens must be integers, got float64",
    ),
    (
        lambda: Sequences(np.arange(3), np.array([0, 3]), np.array([1, 2])),
        ValueError,
        "2 labels need as many offsets",
    ),
    (lambda: Sequences(np.arange(3), np.array([0, 2]), np.array([1])), ValueError, "they run from 0 to 2"),
    (
        lambda: Sequences(np.arange(3), np.array([0, 0, 3]), np.array([1, 2])),
        ValueError,
        "sequence 0 has no tokens",
    ),
    (
        lambda: bucketing.check_bucket_bounds(LENGTHS, "5"),
        TypeError,
        "bucket_bounds must be integers, got '5'",
    ),
    (
        lambda: bucketing.check_bucket_bounds(LENGTHS, (5.5,)),
        TypeError,
        "bucket_bounds must be integers, got (5.5,)",
    ),
    (
        lambda: bucketing.check_bucket_bounds(LENGTHS, (5, 5)),
        ValueError,
        "bucket_bounds must be positive and increase",
    ),
    (
        lambda: bucketing.check_bucket_bounds(LENGTHS, (4,)),
        ValueError,
        "sequence 1 has 5 tokens, more than the last",
    ),
    (lambda: bucketing.check_bucket_bounds(LENGTHS[:0], None), ValueError, "the data set has no sequences"),
    (lambda: bucketing.choose_bucket_bounds(LENGTHS, 0), ValueError, "count and multiple must be at least 1"),
    (batches(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    (batches(batch_size=4), ValueError, "batch_size=4 is larger than the data set of 3 sequences"),
    (batches(epochs=1), ValueError, "give epochs or num_steps, one of them"),
    (batches(num_steps=-1), ValueError, "must not be negative"),
    (batches(host_count=3), ValueError, "host_count=3 must divide batch_size=2"),
    (batches(host_count=2, host_index=2), ValueError, "host_index must be from 0 to 1, got 2"),
    (batches(prefetch=-1), ValueError, "prefetch must not be negative, got -1"),
    (cached(), cache.CorruptCacheError, "manifest.json: the manifest cannot be read"),
    (cached(manifest__json=""), cache.CorruptCacheError, "manifest.json: the manifest is damaged"),
    (
        cached(manifest__json='{"splits": {'),
        cache.CorruptCacheError,
        "the manifest is damaged (JSONDecodeError",
    ),
    (cached(manifest__json="[]"), cache.CorruptCacheError, "the manifest is damaged (TypeError"),
    (
        cached(manifest__json='{"splits": {"train": 3}}'),
        cache.CorruptCacheError,
        "the manifest is damaged (TypeError",
    ),
    (
        cached(manifest__json=json.dumps(MANIFEST | {"version": 2})),
        cache.CorruptCacheError,
        "version is 2, but it should be 1",
    ),
    (
        cached(manifest__json=json.dumps(MANIFEST)),
        cache.CorruptCacheError,
        'content_sha256 is "0", but it should be',
    ),
    (
        cached(manifest__json=json.dumps(MANIFEST | {"splits": {"train": {}}})),
        cache.CorruptCacheError,
        "train.array_record: the file cannot be read",
    ),
    (
        cached(
            manifest__json=json.dumps(MANIFEST | {"splits": {"train": {"bytes": 9}}}),
            train__array_record="cut",
        ),
        cache.CorruptCacheError,
        "train.array_record: the file has",
    ),
]
RUNS = [
    (
        opened(lambda folder: RunDirectory(folder).config()),
        ValueError,
        "holds no run: there is no config.json",
    ),
    (
        opened(lambda folder: RunDirectory.open(folder, to_plain(PLAIN)), {"thesis.tex": ""}),
        ValueError,
        "is not empty (thesis.tex) and holds no run",
    ),
    (
        with_checkpoints(lambda checkpoints: checkpoints.load(3)),
        ValueError,
        "there is no checkpoint of step 3",
    ),
]
ROWS = [*CONFIGS, *MESHES, *TASKS, *DATA, *RUNS]
