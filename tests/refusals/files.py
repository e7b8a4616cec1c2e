"""Files that a user might point a command at, by their paths: config files, official ListOps files, a run's folder."""

from pathlib import Path

GOOD = b"Source\tTarget\r\n( ( ( [MAX 4 ) 9 ) ] )\t9\r\n( ( ( [MIN 4 ) 9 ) ] )\t4\r\n"
NAMES = ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")
SECTIONS = "dict(seed=0, task=dict(name='mqar'), model={}, optimizer=dict(learning_rate=1), train=dict(batch_size=1, steps=1))"
RUN = b'{"seed": 1, "task": {"name": "mqar"}, "model": {}, "optimizer": {}, "train": {}}'

FILES = {
    "file": b"",
    "sizes/config.json": b'{"architectures": ["LlamaForCausalLM"], "hidden_size": "many", "num_hidden_layers": 1, "vocab_size": 5}',
    "headless/config.json": b'{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 5, "num_attention_heads": 0}',
    "one/config.json": b'{"architectures": "LlamaForCausalLM"}',
    "sweep_none.py": b"def get_sweep():\n    return None\n",
    "sweep_field.py": b"def get_sweep():\n    yield {'optimizer.learning_rat': 1}\n",
    "sweep_error.py": b"def get_sweep():\n    return 1 / 0\n",
    "name.py": b"def get_config():\n    return ConfigDict()\n",
    "key.py": b"def get_config():\n    config = {}\n    return config['sed']\n",
    "syntax.py": b"def get_config():\n    return (\n",
    "module.py": b"import no_such_module\n",
    "bytes.py": b"def get_config():\n    return '\xff'\n",
    "nothing.py": b"def get_config():\n    config = {}\n",
    "number.py": b"def get_config():\n    return 3\n",
    "argument.py": b"def get_config():\n    return {}\n",
    "locked.py": b"from ml_collections import ConfigDict\ndef get_config():\n    config = ConfigDict({'train': {}}).lock()\n"
    b"    config.trian.steps = 3\n    return config\n",
    "section.py": f"def get_config():\n    return {SECTIONS} | dict(trian={{}})\n".encode(),
    "missing.py": b"def get_config():\n    return dict(seed=0, task={}, model={})\n",
    "value.py": f"def get_config():\n    return {SECTIONS} | dict(train=3)\n".encode(),
    "array.py": f"import numpy as np\ndef get_config():\n    return {SECTIONS} | dict(model=dict(width=np.array([8])))\n".encode(),
    "taskless.py": f"def get_config():\n    return {SECTIONS} | dict(task=dict(seed=1))\n".encode(),
    "digits/train-images-idx3-ubyte": b"",
    "digits/train-labels-idx1-ubyte": b"",
    "digits/t10k-images-idx3-ubyte": b"",
    "digits/t10k-labels-idx1-ubyte": b"",
    "run/config.json": RUN,
    "null_run/config.json": b"null",
    "no_steps/config.json": RUN,
    "no_steps/checkpoints/notes": b"",
    "unfinished/config.json": RUN,
    "unfinished/results.json": b"{}",
    "listed/config.json": RUN,
    "listed/results.json": b"[]",
    "label/basic_val.tsv": GOOD.replace(b"MIN", b"MAX"),
    "bytes/basic_test.tsv": GOOD.replace(b"( ( ( [MAX", b"( (\xff ( [MAX"),
    "header/basic_train.tsv": GOOD.replace(b"\tTarget", b",Target"),
    "zipped/basic_train.tsv": b"\x1f\x8b\x08" + GOOD,
    "empty/basic_train.tsv": b"Source\tTarget\n",
    "cut_run/config.json": b'{"seed": 1,\n',
    "cut/basic_train.tsv": GOOD.replace(b") ] )\t9", b" )\t9").replace(b"4 ) 9", b"4 ) 9 3"),
    "open/basic_train.tsv": GOOD.replace(b" ] )\t9", b" ]\t9"),
    "word/basic_train.tsv": GOOD.replace(b"[MAX", b"[AVG"),
}
OFFICIAL = ("label", "open", "bytes", "header", "zipped", "empty", "cut", "word")


def write(folder: Path) -> None:
    """Writes all files; each official data set has its other files too."""
    files = {f"{name}/{file}": GOOD for name in OFFICIAL for file in NAMES} | FILES
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
