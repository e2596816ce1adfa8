import pytest

from nft_plugins import Run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, {"model": "<script>", "epochs": 2}, epochs=2)
