"""ListOps data sets: generated and cached, Long Range Arena's files, the trivial predictors, the command line."""

import dataclasses
import random

import pytest

from experiments.data import listops, listops_datasets, prepare
from experiments.data.cache import CorruptCacheError
from experiments.data.fingerprint import content_sha256
from experiments.data.listops import ListOpsConfig
from experiments.data.sequences import Sequences

CONFIG = ListOpsConfig(
    max_depth=4, max_args=4, min_length=8, max_length=50, train=200, validation=40, test=40
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return listops_datasets.load_generated(CONFIG, data_dir=tmp_path_factory.mktemp("data"))


def in_parentheses(text):
    """The expression as Long Range Arena writes it: `( ( ( [MAX 4 ) 9 ) ] )`, folded from the left."""
    stack = []
    for token in text.split():
        if token.startswith("["):
            stack.append((token, []))
            continue
        if token == "]":
            operator, folded = stack.pop()
            for argument in folded:
                operator = f"( {operator} {argument} )"
            token = f"( {operator} ] )"
        if stack:
            stack[-1][1].append(token)
    return token


def write_official(folder, splits):
    folder.mkdir(exist_ok=True)
    for split, name in listops_datasets.OFFICIAL_FILES.items():
        rows = [
            f"{in_parentheses(listops.decode(tokens))}\t{label}" for tokens, label in splits[split].records()
        ]
        (folder / name).write_bytes("\r\n".join(["Source\tTarget", *rows, ""]).encode())


def test_generated_equals_generator(generated):
    assert generated.manifest["parameters"] == dataclasses.asdict(CONFIG)
    assert generated.manifest["vocabulary"] == list(listops.VOCABULARY)
    assert generated.manifest["content_sha256"] == content_sha256(listops.generate(CONFIG))
    assert {split: len(sequences) for split, sequences in generated.splits.items()} == {
        "train": 200,
        "validation": 40,
        "test": 40,
    }


def test_generated_is_loaded_not_generated_again(generated, monkeypatch):
    monkeypatch.setattr(listops, "generate", None)
    again = listops_datasets.load_generated(CONFIG, data_dir=generated.folder.parent)
    assert again.manifest == generated.manifest


def test_error_names_a_command_that_rebuilds(generated, tmp_path, capsys):
    dataset = listops_datasets.load_generated(CONFIG, data_dir=tmp_path)
    manifest = dataset.folder / "manifest.json"
    manifest.write_text("")
    with pytest.raises(CorruptCacheError) as caught:
        listops_datasets.load_generated(CONFIG, data_dir=tmp_path)
    program, *arguments = str(caught.value).split("`")[1].split("experiments.data.prepare ")
    assert program == "python -m "
    arguments = arguments[0].split()
    assert prepare.main(arguments) == 2
    assert str(manifest) in capsys.readouterr().err
    for path in dataset.folder.iterdir():
        path.unlink()
    dataset.folder.rmdir()
    assert prepare.main(arguments) == 0
    assert generated.manifest["content_sha256"] in capsys.readouterr().out


def test_parenthesised_form():
    assert in_parentheses("[MAX 4 [MIN 2 3 ] 9 ]") == "( ( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) 9 ) ] )"


def test_official_files_round_trip(generated, tmp_path):
    write_official(tmp_path / "official", generated.splits)
    for _ in range(2):
        official = listops_datasets.load_official(tmp_path / "official", data_dir=tmp_path)
        assert official.manifest["content_sha256"] == generated.manifest["content_sha256"]
    assert set(official.manifest["parameters"]) == {"basic_train.tsv", "basic_val.tsv", "basic_test.tsv"}


def test_changed_official_files_are_read_again(generated, tmp_path):
    write_official(tmp_path / "official", generated.splits)
    before = listops_datasets.load_official(tmp_path / "official", data_dir=tmp_path)
    write_official(tmp_path / "official", generated.splits | {"test": generated.splits["validation"]})
    after = listops_datasets.load_official(tmp_path / "official", data_dir=tmp_path)
    assert before.folder != after.folder
    assert after.splits["test"].labels.tolist() == generated.splits["validation"].labels.tolist()


@pytest.mark.parametrize(
    "line, message",
    [
        ("( ( ( [MAX 4 ) 9 ) ] )", "an expression, a tab and a digit"),
        ("( ( ( [MAX 4 ) 9 ) ] )\t10", "an expression, a tab and a digit"),
        ("( ( ( [MAX 4 ) 9 ) ] )\t9\t9", "an expression, a tab and a digit"),
        ("( ( ( [AVG 4 ) 9 ) ] )\t9", r"'\[AVG' is not a ListOps token"),
        ("( ( [MAX 4 ) 9 )\t9", "not one complete expression"),
        ("", "an expression, a tab and a digit"),
        ("( ( ( [MAX 4 ) 9 ) ] )\t4", "the label is 4, but the expression is 9"),
        ("( ( ( [SM 4 ) 9 ) ] )\t9", "the label is 9, but the expression is 3"),
        ("( ( ( [MED 4 ) 9 ) ] )\t7", "the label is 7, but the expression is 6"),
        ("( ( ( [MIN 4 ) 9 ) ] )\t4 ", "an expression, a tab and a digit"),
    ],
)
def test_bad_official_line_is_named(generated, tmp_path, line, message):
    write_official(tmp_path, generated.splits)
    path = tmp_path / "basic_val.tsv"
    lines = path.read_text().splitlines()
    lines[17] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"basic_val\.tsv:18: .*{message}"):
        listops_datasets.load_official(tmp_path, data_dir=tmp_path / "cache")


def test_a_byte_that_is_no_text_is_named_with_its_line(generated, tmp_path, capsys):
    write_official(tmp_path, generated.splits)
    path = tmp_path / "basic_train.tsv"
    lines = path.read_bytes().split(b"\r\n")
    for number, found in ((4, b"( [MIN 4 \xff\t4"), (1, b"\x1f\x8b\x08 packed")):
        path.write_bytes(b"\r\n".join([*lines[: number - 1], found, *lines[number:]]))
        assert (
            prepare.main(["listops", f"--official_dir={tmp_path}", f"--data_dir={tmp_path / 'cache'}"]) == 2
        )
        said = capsys.readouterr().err
        assert f"{path}:{number}: byte" in said
        assert "is no UTF-8 text" in said
        assert "Traceback" not in said


def test_a_data_folder_that_is_a_file_is_named(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(OSError, match=f"data_dir='{folder}' is no folder"):
            listops_datasets.load_generated(CONFIG, data_dir=folder)
        with pytest.raises(SystemExit) as left:
            prepare.main(["listops", "--preset=short", f"--data_dir={folder}"])
        assert left.value.code == 2
        assert f"{file} is a file" in capsys.readouterr().err


def test_other_bad_official_files(generated, tmp_path):
    write_official(tmp_path, generated.splits)
    path = tmp_path / "basic_test.tsv"
    path.write_text("Source,Target\n")
    with pytest.raises(ValueError, match=r"basic_test\.tsv:1: the header must be"):
        listops_datasets.load_official(tmp_path, data_dir=tmp_path / "cache")
    path.write_text("Source\tTarget\n")
    with pytest.raises(ValueError, match=r"basic_test\.tsv:2: no expression"):
        listops_datasets.load_official(tmp_path, data_dir=tmp_path / "cache")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks basic_test\.tsv"):
        listops_datasets.load_official(tmp_path, data_dir=tmp_path / "cache")


def expressions(*pairs):
    return Sequences.from_records((listops.encode(text), label) for text, label in pairs)


def test_baselines_on_a_hand_made_set():
    train = expressions(
        ("[MIN 0 1 ]", 0), ("[MIN 0 2 ]", 0), ("[MIN 3 3 ]", 3), ("[MAX 3 1 ]", 3), ("[SM 1 2 ]", 3)
    )
    test = expressions(("[MIN 3 4 ]", 3), ("[MIN 0 5 ]", 0), ("[MAX 3 3 ]", 3), ("[SM 4 4 ]", 8))
    assert listops_datasets.majority_accuracy(train, test) == 0.5
    assert listops_datasets.root_operator_accuracy(train, test) == 0.5
    assert listops_datasets.root_operator_accuracy(train, train) == 0.8
    assert listops_datasets.split_baselines(
        {"train": train, "test": test, "validation": train}, "validation"
    ) == {
        "majority": 0.6,
        "root_operator": 0.8,
    }


@pytest.mark.slow
def test_root_operator_predictor_on_full_size_trees():
    records = [record for block in range(6) for record in listops.draw_block(ListOpsConfig(seed=3), block)]
    random.Random(0).shuffle(records)
    cut = len(records) // 2
    halves = [Sequences.from_records(records[:cut]), Sequences.from_records(records[cut:])]
    assert 0.345 < listops_datasets.root_operator_accuracy(*halves) < 0.39
    assert 0.145 < listops_datasets.majority_accuracy(*halves) < 0.2


def test_prepare_refuses_options_without_meaning(tmp_path, capsys):
    assert prepare.main(["listops", f"--official_dir={tmp_path}", "--preset=short", "--seed=1"]) == 2
    assert "--preset, --seed: no meaning together with --official_dir" in capsys.readouterr().err
    assert prepare.main(["listops", "--max_args=1"]) == 2
    assert "max_args must be at least 2" in capsys.readouterr().err
