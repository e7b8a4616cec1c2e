"""Documents: where they come from, which split they are in, and what is refused."""

import hashlib
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.data.text.documents import corpus_sha256, split_of
from experiments.data.text.sources import read_documents

SPLITS = ("train", "validation", "test")


def write(folder, count=60):
    for number in range(count):
        path = folder / f"{'ab'[number % 2]}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {number}\n")
    return folder


def test_splits_are_those_of_the_hash():
    shares = {
        name: int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 for name in map(str, range(200))
    }
    expected = {name: SPLITS[(share >= 0.9) + (share >= 0.95)] for name, share in shares.items()}
    assert {name: split_of(name) for name in shares} == expected
    assert set(expected.values()) == set(SPLITS)


def test_the_standard_library():
    documents = read_documents("stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("ast.py", "json/decoder.py", "asyncio/events.py"):
        assert (root / name).read_text(encoding="utf-8") in documents[split_of(name)]
    texts = set().union(*documents.values())
    assert not any(
        (root / name).read_bytes().decode() in texts for name in ("encodings/cp037.py", "idlelib/run.py")
    )
    assert sum(map(len, documents["train"])) > 10 * sum(map(len, documents["validation"]))


def test_a_document_stays_in_its_split(tmp_path):
    before = read_documents(write(tmp_path))
    assert [sorted(texts, key=lambda text: int(text.split()[1])) for texts in before.values()] != [[]] * 3
    assert sum(map(len, before.values())) == 60
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "new.txt").write_text("more")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    after = read_documents(tmp_path)
    for split, texts in after.items():
        assert [text for text in texts if text != "more"] == before[split]
    assert "more" in after[split_of("c/new.txt")]
    assert sum(map(len, after.values())) == 61
    assert corpus_sha256(before) != corpus_sha256(after)


def test_one_file_is_cut_by_lines(tmp_path):
    file = tmp_path / "book.txt"
    lines = [f"line {number}\n" for number in range(100)]
    file.write_text("".join(lines))
    expected = {"train": lines[:90], "validation": lines[90:95], "test": lines[95:]}
    assert read_documents(file) == {split: ["".join(part)] for split, part in expected.items()}


def test_records(tmp_path):
    texts = [f"record {number}" for number in range(60)]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "id": 3}) for text in texts) + "\n\n"
    )
    documents = read_documents(tmp_path / "a.jsonl")
    assert documents == {split: [text for text in texts if split_of(text) == split] for split in SPLITS}
    parquet.write_table(pa.table({"text": texts, "id": list(range(60))}), tmp_path / "b.parquet")
    assert read_documents(tmp_path / "b.parquet") == documents
    parquet.write_table(pa.table({"words": texts}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r'c\.parquet is no parquet file with the column "text"'):
        read_documents(tmp_path / "c.parquet")


@pytest.mark.parametrize("line", ["{", '{"texts": "a"}', '{"text": 3}', "[1]", "3", r'{"text": "\ud800"}'])
def test_a_bad_record_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected an object"):
        read_documents(file)


def test_invalid_utf8_is_named_or_replaced(tmp_path):
    write(tmp_path)
    (tmp_path / "b" / "bad.txt").write_bytes(b"ab\xffc")
    with pytest.raises(ValueError, match=r"b/bad\.txt is not UTF-8 at byte 2 \(0xff\); invalid='replace'"):
        read_documents(tmp_path)
    assert "ab\ufffdc" in read_documents(tmp_path, invalid="replace")[split_of("b/bad.txt")]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="invalid='skip'; expected one of error, replace"):
        read_documents("stdlib", invalid="skip")
    with pytest.raises(
        ValueError, match="source='stdlb' is no file or folder; expected stdlib, a path, enwik8, text8"
    ):
        read_documents("stdlb")
    with pytest.raises(
        ValueError, match="official_dir='x' with source='stdlib'; it has a meaning for enwik8, text8"
    ):
        read_documents("stdlib", official_dir="x")
    with pytest.raises(ValueError, match="has no text"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="has 1 documents, none of them in the split"):
        read_documents(tmp_path)
