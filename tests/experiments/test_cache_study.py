"""The study of policies of caches on a tiny run, and the texts that its model is trained on."""

import json
import random

import pytest

from experiments import cache_study
from experiments import train as train_command
from experiments.data import retrieval_texts
from experiments.data.retrieval_prompts import make_prompts
from layers.caches import read_cache

TINY = "width=16,depth=2,length=160,steps=2"


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEQMODELS_DATA", str(tmp_path / "data"))
    file, workdir, out = tmp_path / "texts.jsonl", tmp_path / "run", tmp_path / "study"
    assert retrieval_texts.main([f"--out={file}", "--length=1200", "--count=60", "--tasks=passkey"]) == 0
    config = f"--config=configs/lm/needles.py:source={file},{TINY}"
    fields = ["--config.train.batch_size=2", "--config.train.tensorboard=False", "--config.task.test=8"]
    assert train_command.main([config, *fields, f"--workdir={workdir}", "--num_devices=1"]) == 0
    command = [
        f"--workdir={workdir}",
        f"--out={out}",
        "--length=256",
        "--examples=2",
        "--rows=1",
        "--budgets=1/3",
    ]
    assert cache_study.main([*command, "--policies=snapkv", "--tasks=perplexity"]) == 0
    first = json.loads((out / "cache-study.json").read_text())["rows"]
    assert [(row["policy"], row["share"]) for row in first] == [
        ("full", 1.0),
        ("snapkv", pytest.approx(1 / 3)),
    ]
    assert first[1]["cache"] == "snapkv(budget=85, window=32)"
    assert all(row["score"] > 1 for row in first)
    capsys.readouterr()
    assert cache_study.main([*command, "--policies=snapkv,gemfilter", "--tasks=perplexity,passkey"]) == 0
    rows = json.loads((out / "cache-study.json").read_text())["rows"]
    assert rows[:2] == first
    assert "perplexity" not in capsys.readouterr().out.split("gemfilter")[0]
    assert len(rows) == 6
    # Layer 3 is not there.
    assert rows[-1]["score"] is None
    assert "layer=3 of the cache" in rows[-1]["reason"]
    assert (out / "cache-study.png").stat().st_size > 1000
    assert cache_study.main([*command, "--policies=snapkv", "--tasks=perplexity", "--seed=1"]) == 2
    assert "has figures with another seed" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', '{"setting": 3, "rows": []}'])
def test_damaged_figures_are_refused_and_kept(tmp_path, content):
    file = tmp_path / "cache-study.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="cache-study.json is damaged .*; remove it, or give another folder"):
        cache_study._rows_so_far(file, {"seed": 0})
    assert file.read_text() == content


def test_templates_fill_in_what_policies_take():
    for name, template in cache_study.TEMPLATES.items():
        for share in cache_study._budgets(["1/100", "1/3", "9/10"]):
            policy = read_cache(cache_study.filled(template, share, 4000))
            assert type(policy).__name__.lower() == name
    assert (
        cache_study.filled("{budget} {half} {left}", *cache_study._budgets(["1/4"]), 4096) == "1024 512 0.75"
    )


def test_texts_are_prompts_with_answers():
    texts = list(retrieval_texts.texts(("passkey", "variable_tracking"), 800, 6))
    assert len({text[:400] + text[-40:] for text in texts}) == 6
    assert max(map(len, texts)) < 850
    for number, text in enumerate(texts):
        assert ("pass key is" in text) == (number % 2 == 0)
        assert text.endswith(".")
    seed = retrieval_texts.SEED
    size = int(800 * retrieval_texts.SHORTEST ** -random.Random(seed).random())
    (prompt,) = make_prompts("passkey", length=size, count=1, seed=seed, tokens=len)
    assert texts[0] == f"{prompt.text} {prompt.answers[0]}."
