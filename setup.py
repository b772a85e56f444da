"""Puts the training scripts and the configurations into the package that is installed; all else is pyproject.toml."""

from setuptools import find_packages, setup

# Folders at the top of the repository, which an installed package has inside: moe_peft/train and moe_peft/configs.
INSIDE = {"moe_peft.train": "train", "moe_peft.configs": "configs"}

setup(packages=[*find_packages(include=["moe_peft*"]), *INSIDE], package_dir=INSIDE)
