"""The study `pretrained` at its smallest sizes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.benchmark import __main__ as command
from experiments.benchmark import pretrained, random_checkpoints
from seqmodels import load_pretrained
from seqmodels.interop import files


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return pretrained.Setting(tmp_path_factory.mktemp("checkpoints"), rounds=1)


@pytest.mark.parametrize("model", random_checkpoints.CONFIGS)
def test_checkpoints_are_written_in_pieces(setting, model, monkeypatch):
    monkeypatch.setattr(random_checkpoints, "SHARD", 50_000)
    row = pretrained.measure(setting, f"write/{model}")
    folder = setting.folder / model
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert row["bytes"] == sum(file.stat().st_size for file in shards)
    assert row["parameters"] == pytest.approx(row["bytes"] / 2, rel=0.1)
    config = json.loads((folder / files.CONFIG).read_text())
    assert config["architectures"][0] in random_checkpoints.FAMILIES
    drawn = np.concatenate([tensor.ravel() for tensor in load_file(shards[0]).values()]).astype(np.float32)
    assert np.isfinite(drawn).all()
    assert drawn.std() > 0.01
    load_pretrained(folder)
    if model == "llama":
        row = dict(case="load/llama") | pretrained.measure(setting, "load/llama")
        assert row["bytes"] == sum(file.stat().st_size for file in shards)
        assert row["cold_ratio"] > 0
        assert row["warm_ratio"] == row["seconds"]["warm_load"][0] / row["seconds"]["warm_read"][0]
        assert "of reading" in pretrained.line(row)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    arguments = [
        "pretrained",
        f"--out={tmp_path}",
        "--size=tiny",
        "--rounds=1",
        "--only=decode/llama,long",
    ]
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "pretrained.json").read_text())
    assert [row["case"] for row in record["rows"]] == [
        "write/llama",
        "decode/llama",
        "write/mamba2",
        "long/mamba2",
    ]
    _, decode, _, long = record["rows"]
    assert [step["batch"] for step in decode["steps"]] == list(pretrained.BATCHES_ON_CPU)
    assert decode["steps"][1]["state_bytes"] == pytest.approx(2 * decode["steps"][0]["state_bytes"], rel=0.01)
    short, far = long["steps"]
    assert far["context"] > short["context"]
    assert far["state_bytes"] == short["state_bytes"]
    assert "tokens/s" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_cases_and_their_checkpoints():
    assert pretrained.chosen(["decode/transformers"]) == ["write/llama", "decode/transformers"]
    assert pretrained.chosen(["load"])[0] == "write/llama"
    assert pretrained.chosen([]) == list(pretrained.CASES)
    with pytest.raises(ValueError, match="only='decode/lama' is no case; did you mean 'decode/llama'"):
        pretrained.chosen(["decode/lama"])


def test_the_comparison():
    ours, theirs = (
        {"case": case, "steps": [{"batch": batch, "tokens_per_second": rate * batch} for batch in (1, 32)]}
        for case, rate in (("decode/llama", 30.0), ("decode/transformers", 10.0))
    )
    assert pretrained.compared(theirs, [ours])["ours_over_theirs"] == {"1": 3.0, "32": 3.0}
    assert pretrained.compared(theirs, []) == theirs
    assert pretrained.compared(ours, [theirs]) == ours
    assert pretrained.line({"case": "decode/transformers", "left_out": "torch"}).endswith("left out: torch")
