"""Published corpora in the form of their official files, made small, and what is refused."""

import gzip
import zipfile

import pytest

from experiments.data.text import official
from experiments.data.text.documents import by_hash
from experiments.data.text.sources import read_documents

ARTICLES = {
    "train": [
        " \n = First <unk> = \n \n Some text , with a = b . \n \n = = Section = = \n \n More . \n \n",
        " = Second = \n \n = no heading = \n Text . \n \n",
    ],
    "validation": [" \n = Third = \n \n Held out é . \n \n"],
    "test": [" \n = Fourth = \n \n Also . \n"],
}
FILES = {"train": "wiki.train", "validation": "wiki.valid", "test": "wiki.test"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(official, "SIZE", 100)
    monkeypatch.setattr(official, "CUTS", (90, 95))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_enwik8_is_cut_by_bytes_at_characters(tmp_path, small):
    # The cut after 90 bytes falls into the euro sign, which begins at byte 88.
    data = ("<x>é" + "a" * 83 + "€" + "b" * 6 + "\r\nz").encode()
    assert len(data) == 100
    (tmp_path / "enwik8").write_bytes(data)
    wanted = {
        "train": [data[:88].decode()],
        "validation": [data[88:95].decode()],
        "test": [data[95:].decode()],
    }
    assert wanted["validation"][0].startswith("€")
    for path in (tmp_path / "enwik8", tmp_path, write_zip(tmp_path / "enwik8.zip", {"enwik8": data})):
        assert read_documents("enwik8", official_dir=path) == wanted
    (tmp_path / "enwik8").unlink()
    assert read_documents("enwik8", official_dir=tmp_path) == wanted


def test_text8(tmp_path, small):
    text = "anarchism " * 10
    path = write_zip(tmp_path / "text8.zip", {"text8": text})
    expected = {"train": [text[:90]], "validation": [text[90:95]], "test": [text[95:]]}
    assert read_documents("text8", official_dir=path) == expected
    (tmp_path / "text8").write_text(text[:50] + "A" + text[51:])
    with pytest.raises(ValueError, match="text8 has b'A' at byte 50; expected a to z and spaces"):
        read_documents("text8", official_dir=tmp_path / "text8")


@pytest.mark.parametrize("form", [".tokens", ".raw"])
def test_wikitext_is_cut_into_articles(tmp_path, form):
    files = {FILES[split] + form: "".join(texts) for split, texts in ARTICLES.items()}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    archive = write_zip(
        tmp_path / "wikitext-103-v1.zip", {f"wikitext-103/{name}": text for name, text in files.items()}
    )
    for path in (tmp_path, archive):
        assert read_documents("wikitext103", official_dir=path) == ARTICLES


def test_malformed_files_are_refused_by_name(tmp_path, small):
    def refused(corpus, path, message):
        with pytest.raises(ValueError, match=message):
            read_documents(corpus, official_dir=path)

    refused("enwik8", None, r"source='enwik8' needs official_dir \(task.official_dir in configs\)")
    refused("enwik8", tmp_path / "none", "none' does not exist; expected the archive or folder of enwik8")
    refused("enwik8", tmp_path, "has neither enwik8 nor enwik8.zip")
    (tmp_path / "enwik8").write_bytes(b"a" * 99)
    refused("enwik8", tmp_path, "enwik8 has 99 bytes; expected 100")
    (tmp_path / "enwik8").write_bytes(b"a" * 92 + b"\xff" + b"a" * 7)
    refused("enwik8", tmp_path, r"enwik8, validation is not UTF-8 at byte 2 \(0xff\)")
    (tmp_path / "no.zip").write_bytes(b"PK no archive")
    refused("enwik8", tmp_path / "no.zip", r"no\.zip is no readable \.zip")
    refused("wikitext103", tmp_path / "no.zip", r"no\.zip is no readable \.zip")
    other = write_zip(tmp_path / "other.zip", {"a/readme": "x"})
    refused("text8", other, r"other\.zip lacks text8; it has readme")
    damaged = write_zip(tmp_path / "bad.zip", {"text8": bytes(range(97, 122)) * 4})
    content = bytearray(damaged.read_bytes())
    content[40] ^= 0xFF
    damaged.write_bytes(content)
    refused("text8", damaged, r"bad\.zip: text8 is damaged")
    refused("wikitext103", tmp_path / "enwik8", r"is no folder and no \.zip; expected wikitext-103-v1\.zip")
    (tmp_path / "wiki.train.raw").write_text("no heading")
    refused("wikitext103", tmp_path, r"lacks wiki\.valid\.raw, wiki\.test\.raw")
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        (tmp_path / name).write_text(" = A = \n")
    refused("wikitext103", tmp_path, r"wiki\.train\.raw has no heading of an article")
    (tmp_path / "wiki.train.tokens").write_text(" = A = \n")
    refused("wikitext103", tmp_path, "has files of tokens and raw ones")


def test_an_rfc_is_read_once_by_its_number(tmp_path):
    """Links, older texts and other forms of an RFC do not count twice, and splits follow from numbers."""
    for folder in ("standard", "old", "links"):
        (tmp_path / folder).mkdir()
    texts = {f"rfc{number}": f"RFC {number}\n" for number in range(1, 61)}
    for name, text in texts.items():
        (tmp_path / "standard" / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "links" / "rfc1.txt.gz").symlink_to("../standard/rfc1.txt.gz")
    (tmp_path / "old" / "rfc61.txt").write_text("RFC 61\n")
    for other in ("rfc62.html.gz", "rfc-index.txt.gz", "rfc007.txt"):
        (tmp_path / "standard" / other).write_bytes(b"no text")
    found = read_documents("rfc", official_dir=tmp_path)
    texts["rfc61"] = "RFC 61\n"
    assert found == by_hash(texts.items())
    assert all(found.values())
    assert sum(map(len, found.values())) == 61


def test_malformed_rfcs_are_refused_by_name(tmp_path):
    def refused(message, path=tmp_path, **options):
        with pytest.raises(ValueError, match=message):
            read_documents("rfc", official_dir=path, **options)

    refused("has no file rfcN.txt or rfcN.txt.gz at any depth")
    path = tmp_path / "rfc7.txt.gz"
    refused("rfc7.txt.gz' does not exist", path)
    path.write_bytes(gzip.compress(b"a\xff"))
    refused("is no folder; expected one with rfc1.txt.gz", path)
    refused(r"rfc7.txt.gz is not UTF-8 at byte 1 \(0xff\)")
    refused("has 1 documents, none of them in the split", invalid="replace")
    for damaged in (b"no gzip", path.read_bytes()[:-9], path.read_bytes()[:12] + b"\xff" * 9):
        path.write_bytes(damaged)
        refused("rfc7.txt.gz cannot be read")


@pytest.mark.parametrize("flag, offsets, value", [("encrypted", (6, 8), 1), ("compression", (8, 10), 98)])
def test_an_archive_that_zipfile_cannot_unpack_is_not_called_damaged(tmp_path, small, flag, offsets, value):
    archive = write_zip(tmp_path / f"{flag}.zip", {"text8": b"ab" * 50})
    content = bytearray(archive.read_bytes())
    for mark, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), offsets, strict=True):
        content[content.index(mark) + offset] = value
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="text8 cannot be unpacked here .*; unpack it and give the folder"):
        read_documents("text8", official_dir=archive)
