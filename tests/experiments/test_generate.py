"""The command that continues prompts with the language model of a run."""

import json
import re
import shutil

import numpy as np
import pytest

from experiments import generate, long_context
from experiments.config.command_line import EXIT_DIVERGED, ArgumentError
from experiments.data.text.tokenizers import Bytes, Characters
from experiments.parallel.mesh import Devices
from experiments.runs import results as run_results
from experiments.runs import trusted
from experiments.runs.directory import RunDirectory
from experiments.runs.interrupts import Stop
from experiments.training import experiment, loop
from seqmodels import Generation

LONGEST = 47  # no multiple of the lines, so that rows begin anywhere in them


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose model has learned lines of abc."""
    folder = tmp_path_factory.mktemp("run")
    source = folder / "text.txt"
    source.write_text("abc\n" * 1500)
    config = dict(
        seed=0,
        task=dict(name="language", source=str(source), length=LONGEST, data_dir=str(folder / "data")),
        model=dict(
            kind="language_model",
            width=16,
            depth=1,
            pattern=("lru",),
            channel="none",
            mixer_defaults=dict(state_size=8),
            absolute_positions="learned",
            max_positions=LONGEST,
        ),
        optimizer=dict(learning_rate=0.03, warmup_steps=1, ema=0.5),
        train=dict(batch_size=8, steps=100, eval_every=10.0, log_every=50, tensorboard=False),
        data=dict(prefetch=1),
        mesh={},
    )
    plan = experiment.build(config)
    work = RunDirectory.open(folder / "run", config)
    work.begin(config, plan.task.manifest, plan.groups_table)
    devices = Devices.first(1)
    work.write_results(
        run_results.summarize(plan, loop.train(plan, work, devices=devices, stop=Stop()), devices)
    )
    work.release()
    return folder / "run"


def call(folder, *arguments):
    return generate.main([f"--workdir={folder}", *arguments])


def test_prompts_are_continued(run, capsys):
    before = sorted(run.rglob("*"))
    assert call(run, "--prompt=ab", "--prompt=bc", "--temperature=0", "--max_new_tokens=9") == 0
    assert capsys.readouterr().out == "abc\nabc\nabc\n" + "bc\nabc\nabc\n\n"
    drafts = ["--lookup=4", "--ngram=2"]
    assert call(run, "--prompt=ab", "--temperature=0", "--max_new_tokens=12", *drafts) == 0
    out, err = capsys.readouterr()
    assert out == "abc\nabc\nabc\nab\n"
    # The first draft stands behind the second "ab"; blocks are of 8 tokens.
    assert re.search(
        r"^12 tokens in ([5-9]) calls of the model, (1\.[3-9]|2\.[0-4])\d per call$", err, re.MULTILINE
    )
    # The stop is not printed, whichever tokens and blocks it lies in.
    assert (
        call(run, "--prompt=ab", "--temperature=0", "--max_new_tokens=20", "--stop=bc\nab", "--stop=x") == 0
    )
    assert capsys.readouterr().out == "abc\na\n"
    sampled = ["--prompt=a", "--max_new_tokens=16", "--temperature=3", "--checkpoint=last"]
    said = []
    for seed in (1, 1, 2):
        assert call(run, *sampled, f"--seed={seed}") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
def test_a_run_drafts_for_another(run, capsys):
    drafts = [f"--draft={run}", "--draft_tokens=3"]
    assert call(run, "--prompt=ab", "--temperature=0", "--max_new_tokens=12", *drafts) == 0
    out, err = capsys.readouterr()
    assert out == "abc\nabc\nabc\nab\n"
    # Blocks of 8 and 4 tokens, 4 a call, as the model drafts for itself.
    assert err.startswith("12 tokens in 3 calls of the model, 4.00 per call")


def test_another_tokenizer_is_refused_and_another_corpus_is_not(run, capsys, monkeypatch):
    tokenizer = Bytes.__init__

    def other(self):
        tokenizer(self)
        self.manifest["sha256"] = "other"

    monkeypatch.setattr(Bytes, "__init__", other)
    assert call(run, "--prompt=ab", "--max_new_tokens=1") == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(ArgumentError, match=r"--draft=.* reads other tokens: its tokenizer is .*bytes"):
        generate.drafting(run, Characters("abc\n"))
    source = run.parent / "text.txt"
    text = source.read_text()
    source.write_text(text + "abc\n")
    try:
        assert call(run, "--prompt=ab", "--max_new_tokens=1") == 0
        assert long_context.main([f"--workdir={run}", "--positions=20"]) == 2
        assert "was trained on other data: " in capsys.readouterr().err
    finally:
        source.write_text(text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt="], "--prompt= is empty; expected a text"),
        (["--prompt=a", "--stop="], "--stop= is empty"),
        (["--prompt=\udcff"], "cannot be encoded: 'utf-8' codec can't encode"),
        (
            ["--prompt=a", "--prompt=" + "a" * 49, "--max_new_tokens=1"],
            "expected at most 0 new tokens, or a shorter",
        ),
        (["--prompt=a", "--max_new_tokens=49"], "needs 49 positions, but max_positions=47"),
        (["--prompt=a", "--max_new_tokens=8", "--top_k=0"], "top_k=0; expected an integer from 1 to 257"),
        (["--prompt=a", "--max_new_tokens=8", "--top_p=2"], "top_p=2.0; expected"),
        (["--prompt=a", "--ngram=2"], "ngram=2 has no effect without lookup"),
        (["--prompt=a", "--max_new_tokens=8", "--lookup=2", "--ngram=9"], "ngram=9; expected at most 8"),
        (["--prompt=a", "--max_new_tokens=8", "--temperature=-1"], "temperature=-1.0; expected"),
        (["--prompt=a", "--max_new_tokens=8", "--temperature=0", "--min_p=0.1"], "min_p=0.1 has no effect"),
        (["--prompt=a", "--checkpoint=7"], "there is no such checkpoint; steps with one: "),
    ],
)
def test_what_cannot_be_used_is_refused(run, capsys, arguments, message):
    assert call(run, *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(model=dict(kind="classifier")),
            "the run's model is of kind 'classifier'; expected a language_model",
        ),
        (
            dict(task=dict(name="mqar")),
            "the task 'mqar' of the run has no tokenizer; expected a task of texts",
        ),
    ],
)
def test_runs_without_texts_are_refused(run, tmp_path, capsys, change, message, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    changed = json.dumps(RunDirectory(run).config() | change)
    trusted.write(tmp_path / "run", {"config.json": changed})

    class Plan:
        task = object()

    monkeypatch.setattr(experiment, "build", lambda config: Plan)
    assert call(tmp_path / "run", "--prompt=a") == 2
    assert message in capsys.readouterr().err


def test_logits_that_are_not_finite_have_their_exit_code(run, capsys, monkeypatch):
    def fail(*_, **__):
        yield Generation(np.asarray([[97]]), np.asarray([1]), np.zeros((1, 1)))
        raise FloatingPointError("the logits of row 0 are not finite")

    monkeypatch.setattr(generate, "stream", fail)
    assert call(run, "--prompt=b") == EXIT_DIVERGED
    out, err = capsys.readouterr()
    assert out == "ba"
    assert "the logits of row 0 are not finite" in err


def blocks_of(ids, size):
    for start in range(0, len(ids), size):
        piece = np.asarray([ids[start : start + size]])
        yield Generation(piece, np.asarray([piece.shape[1]]), np.zeros(piece.shape))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    "stops, wanted",
    [
        ((), "aé€😀b\ufffd"),
        (("😀",), "aé€"),
        (("é€",), "a"),
        (("€x", "b"), "aé€😀"),
        (("zz", "\ufffdz"), "aé€😀b\ufffd"),
    ],
)
def test_pieces_make_up_the_text_and_hold_whole_characters(size, stops, wanted):
    ids = [*"aé€😀b".encode(), 0xF0, Bytes.end]
    pieces = list(generate.texts(blocks_of(ids, size), Bytes(), stops))
    assert "".join(pieces) == wanted
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    unended = list(generate.texts(blocks_of(ids[:-1], size), Bytes(), stops))
    assert "".join(unended) == wanted


def test_characters_that_a_terminal_lacks_become_question_marks(monkeypatch):
    import io

    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    generate.show("a€b")
    assert terminal.buffer.getvalue() == b"a?b"
