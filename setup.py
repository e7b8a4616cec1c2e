"""Puts the folder configs/ into the wheel as experiments/configs; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

CODE = find_packages(include=["layers*", "seqmodels*", "experiments*"], exclude=["experiments.results*"])
CONFIGS = ["", *(f".{folder}" for folder in find_namespace_packages("configs"))]

setup(
    packages=[*CODE, *(f"experiments.configs{folder}" for folder in CONFIGS)],
    package_dir={"experiments.configs": "configs"},
)
