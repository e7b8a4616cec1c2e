"""The command that writes checkpoints in the format of transformers, and generation from such a checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import convert, generate

DATA = Path(__file__).parents[1] / "seqmodels" / "interop" / "data"


def test_a_checkpoint_is_read_written_and_listed(tmp_path, capsys):
    target = tmp_path / "out"
    assert convert.main([str(DATA / "mamba"), str(target), "--param_dtype=bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tensors = load_file(target / "model.safetensors")
    assert len(lines) == len(tensors) + 1
    assert lines[0].split() == ["backbone.embeddings.weight", "[40,", "16]", "640"]
    count = sum(tensor.size for tensor in tensors.values())
    assert lines[-1] == f"MambaForCausalLM: {len(tensors)} tensors, {count:,} parameters in {target}"
    assert tensors["backbone.embeddings.weight"].dtype == "bfloat16"
    want = load_file(DATA / "mamba" / "model.safetensors")["backbone.embeddings.weight"]
    np.testing.assert_allclose(tensors["backbone.embeddings.weight"].astype(np.float32), want, rtol=2**-8)


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("llama", ["--architecture=Phi4"], "unknown architecture 'Phi4'"),
        ("llama", ["--architecture=Qwen3ForCausalLM"], "qk_norm=True and the model False"),
        ("none", [], "is no folder; expected the work directory of a run"),
        ("", [], "holds no run"),
    ],
)
def test_what_cannot_be_converted_is_refused(source, options, message, tmp_path, capsys):
    assert convert.main([str(DATA / source), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Letters:
    """A tokenizer of a vocabulary of 40 whose end is token 0."""

    end = 0

    def encode(self, text):
        return np.array([ord(letter) - ord("A") + 1 for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(ord("A") - 1 + number) for number in ids)


def test_generation_from_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(generate, "make_tokenizer", lambda *_, **__: Letters())
    expected = load_file(DATA / "llama" / "expected.safetensors")
    letters = Letters()
    arguments = [f"--pretrained={DATA / 'llama'}", "--max_new_tokens=32", "--temperature=0"]
    prompt = letters.decode(expected["tokens"][0, :8])
    assert generate.main([*arguments, f"--prompt={prompt}"]) == 0
    wanted = letters.decode(expected["greedy"][0])
    assert capsys.readouterr().out == f"{prompt}{wanted.partition(letters.decode([0]))[0]}\n"


def test_generation_needs_one_model_and_its_tokenizer(tmp_path, capsys):
    for arguments in ([], ["--workdir=a", "--pretrained=b"]):
        assert generate.main([*arguments, "--prompt=a"]) == 2
        assert "expected one of --workdir and --pretrained" in capsys.readouterr().err
    folder = tmp_path / "llama"
    shutil.copytree(DATA / "llama", folder)
    assert generate.main([f"--pretrained={folder}", "--prompt=a"]) == 2
    assert "tokenizer.json' cannot be read" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "x", "architectures": ["X"]}))
    assert generate.main([f"--pretrained={folder}", "--prompt=a"]) == 2
    assert "is of the architecture 'X'" in capsys.readouterr().err
