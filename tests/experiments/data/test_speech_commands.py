"""Speech Commands: small recordings in the official layout, its lists, scale and stride, and malformed files."""

import pathlib
import runpy
import wave

import numpy as np
import pytest

from experiments.config.loading import TrainConfig, section, to_plain
from experiments.data import speech_commands
from experiments.data.log_mel import log_mel
from experiments.data.speech_commands import WORDS
from experiments.tasks import make_task
from experiments.training.experiment import model_without_data

CONFIG = pathlib.Path(__file__).resolve().parents[3] / "configs" / "speech" / "commands.py"


def record(path, samples, rate=16_000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())


@pytest.fixture
def archive(tmp_path):
    """Two clips of each word: a short one, and one that is too long; the last three words are in the lists."""
    rng, clips = np.random.default_rng(0), {}
    root = tmp_path / "archive"
    for word in WORDS:
        (root / word).mkdir(parents=True)
        for name, length in (("a.wav", 700), ("b.wav", 16_500)):
            clips[f"{word}/{name}"] = rng.integers(-(2**15), 2**15, length).astype(np.int16)
            record(root / word / name, clips[f"{word}/{name}"])
    (root / "_background_noise_").mkdir()
    (root / "validation_list.txt").write_text("zero/b.wav\nyes/a.wav\n")
    (root / "testing_list.txt").write_text("wow/a.wav\n")
    return root, clips


def test_clips_splits_and_scale(archive, tmp_path):
    root, clips = archive
    task = make_task("speech_commands", official_dir=root, data_dir=tmp_path / "data")
    sizes = {split: len(source) for split, source in task.splits.items()}
    assert sizes == dict(train=67, validation=2, test=1)
    held_out = {"zero/b.wav", "yes/a.wav", "wow/a.wav"}
    padded = {
        name: np.pad(clip[:16_000].astype(float), (0, max(0, 16_000 - len(clip))))
        for name, clip in clips.items()
    }
    train = np.stack([clip for name, clip in padded.items() if name not in held_out])
    mean, deviation = train.mean(), train.std() + 1e-5
    batch = task.splits["validation"].gather(np.array([1, 0]), 16_000)
    expected = np.stack([(padded[name] - mean) / deviation for name in ("yes/a.wav", "zero/b.wav")])
    np.testing.assert_allclose(batch["inputs"][..., 0], expected, atol=1e-5)
    assert batch["labels"].tolist() == [WORDS.index("yes"), WORDS.index("zero")]
    half = make_task("speech_commands", official_dir=root, data_dir=tmp_path / "data", stride=2)
    np.testing.assert_allclose(
        half.splits["validation"].gather(np.array([1]), 8000)["inputs"][0, :, 0], expected[0, ::2], atol=1e-5
    )
    with pytest.raises(ValueError, match="clips of 8000 samples are not padded to 9000"):
        half.splits["test"].gather(np.array([0]), 9000)
    assert len(WORDS) == 35
    assert sorted(WORDS) == WORDS


def test_malformed_files_are_named(archive, tmp_path):
    root, clips = archive
    load = lambda: speech_commands.load(root, data_dir=tmp_path / "other")  # noqa: E731
    (root / "testing_list.txt").write_text("wow/a.wav\nwow/c.wav\n")
    with pytest.raises(ValueError, match=r"testing_list.txt, row 2: there is no clip 'wow/c.wav'"):
        load()
    (root / "testing_list.txt").write_text("\n")
    with pytest.raises(ValueError, match="leaves the split 'test' without a clip"):
        load()
    (root / "testing_list.txt").write_text("wow/a.wav\n")
    record(root / "cat" / "a.wav", clips["cat/a.wav"], rate=8000)
    with pytest.raises(ValueError, match=r"cat/a.wav has 16 bits, 1 channels and 8000 Hz; expected 16 bits"):
        load()
    (root / "cat" / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="cat/a.wav cannot be read as a WAV file"):
        load()
    (root / "validation_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks validation_list.txt; unpack speech_commands_v0.02"):
        load()


@pytest.mark.parametrize(
    "options, problem",
    [({}, "task.official_dir is not given"), (dict(stride=0), "task.stride=0"), (dict(stride=20_000), "at most 16000"),
     (dict(features="mel"), "task.features='mel'; expected"), (dict(features="log_mel", stride=2), "task.stride=2 with task.features='log_mel'")],
)  # fmt: skip
def test_wrong_options_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        make_task("speech_commands", **options)


def test_config():
    config = to_plain(runpy.run_path(str(CONFIG))["get_config"]("mixer=s5,width=8,depth=1"))
    section(config, "train", TrainConfig)
    model = model_without_data(config)
    assert (model.config.num_classes, model.config.input.input_size) == (35, 1)
    config = to_plain(runpy.run_path(str(CONFIG))["get_config"]("mixer=s5,width=8,depth=1,features=log_mel"))
    assert model_without_data(config).config.input.input_size == 80


def test_spectrograms_of_clips(archive, tmp_path):
    root, clips = archive
    task = make_task("speech_commands", official_dir=root, data_dir=tmp_path / "data", features="log_mel")
    batch = task.splits["validation"].gather(np.array([1]), 100)
    samples = np.pad(clips["yes/a.wav"], (0, 15_300)) / 2**15
    np.testing.assert_allclose(batch["inputs"], log_mel(samples[None]), atol=1e-6)
    assert task.splits["train"].lengths.tolist() == [100] * 67
    with pytest.raises(ValueError, match="clips of 100 frames are not padded to 16000"):
        task.splits["test"].gather(np.array([0]), 16_000)
