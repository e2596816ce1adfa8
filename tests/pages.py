"""Reads the data that a page holds for its scripts."""

import json
import re


def read_data(page, kind):
    """The data of each place of this kind, `curves` or `gallery`."""
    found = re.findall(
        rf'<div class="{kind}"><script type="application/json">(.*?)</script></div>', page, re.DOTALL
    )
    return [json.loads(text) for text in found]
