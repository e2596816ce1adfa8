import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fuzz():
    """benchmarks/fuzz.py as a module."""
    file = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # Dataclasses look there.
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]
