"""Pipelines with random weights, each built once for a process of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode does not put it there.
from families import FAMILIES


def build(name, folder):
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    return build("sd3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """The folder of a family's pipeline, by name."""
    built = {}

    def folder(name):
        if name not in built:
            built[name] = build(name, tmp_path_factory.mktemp(name))
        return str(built[name])

    return folder
