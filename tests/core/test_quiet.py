"""Bars of files that are read go; those of downloads stay, unless they were switched off."""

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from nft_core.quiet import quiet


@pytest.mark.parametrize("before", [enable_progress_bars, disable_progress_bars])
def test_bars_of_downloads_are_left_as_they_were(before):
    before()
    disabled = are_progress_bars_disabled()
    quiet("diffusers", "transformers")
    assert are_progress_bars_disabled() == disabled
    enable_progress_bars()
