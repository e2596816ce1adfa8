"""The card alone: what it computes needs its environment, `nft env create oldscore`."""

from nft_plugins.rules import choose_environment, name_environment

import nft_oldscore


def test_the_plug_in(check_plugin):
    (card,) = check_plugin(nft_oldscore)
    environment = choose_environment(card, {})
    assert name_environment(card, environment) == "oldscore"
    assert environment.python == ">=3.10,<3.11"
