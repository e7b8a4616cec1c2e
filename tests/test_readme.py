"""The example on the README's first screen runs as it stands, and is short."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = "range(300)"
MOST_LINES = 32


def example() -> str:
    (found,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return found


def run(source: str, monkeypatch, capsys) -> tuple[float, str]:
    """Runs the example in the folder of the README; returns the loss and the text that it prints."""
    monkeypatch.chdir(ROOT)
    exec(compile(source, "README.md", "exec"), {})  # noqa: S102
    said = re.fullmatch(r"loss (\d+\.\d+) (b['\"].*['\"])\n", capsys.readouterr().out)
    return float(said[1]), eval(said[2])  # noqa: S307  a literal of bytes


def test_the_example_is_one_screen_and_shows_what_one_has_to_know():
    assert len([line for line in example().splitlines() if line.strip()]) <= MOST_LINES
    for word in ("key=key", "segment_ids=", "max_length=", "optax", "init_state"):
        assert word in example()
    compile(example(), "README.md", "exec")


@pytest.mark.slow
def test_the_example_learns_and_generates(monkeypatch, capsys):
    assert STEPS in example()
    loss, text = run(example().replace(STEPS, "range(60)"), monkeypatch, capsys)
    assert loss < 3.3  # 5.5 at the start, about 3.3 by the frequencies of bytes alone
    assert len(text) == 100
    assert text.startswith(b"The ")
