"""What of the contract works without torch, on any Python that it is for. `.ci/pythons` runs this with each."""

import importlib
import pkgutil
import sys

import pluggy

import nft_plugins
from nft_plugins import PROJECT, hookspecs

for module in pkgutil.walk_packages(nft_plugins.__path__, "nft_plugins."):
    if module.name != "nft_plugins.testing.fixtures":  # It is pytest's, which is not here.
        importlib.import_module(module.name)

from nft_plugins.testing import check_plugin  # noqa: E402

manager = pluggy.PluginManager(PROJECT)
manager.add_hookspecs(hookspecs)
cards: list = []
for name in ("nft_colourfulness", "nft_ab3"):
    assert [type(card) for card in check_plugin(name)]
    manager.register(importlib.import_module(name))
manager.hook.nft_register_rewards(register=cards.append)
manager.hook.nft_register_solvers(register=cards.append)
assert [card.name for card in cards] == ["colourfulness", "ab3"], cards
solver = nft_plugins.SteppedSolver()
solver.step = lambda velocity, x, t, s, state, generator: (x + (s - t) * velocity(x, t), state)
assert solver.solve(lambda x, t: 2.0, 1.0, (1.0, 0.5, 0.0), None) == -1.0
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
