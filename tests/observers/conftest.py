import pytest

from nft_core.host.host import load_host
from nft_plugins import Run


@pytest.fixture
def host():
    return load_host()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, {"model": "<script>", "epochs": 2}, epochs=2)
