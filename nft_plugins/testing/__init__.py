"""The conformance kit: what every plug-in must do, as checks to run in its own tests.

Each check raises AssertionError, which says what a correct plug-in does. The same functions come as pytest
fixtures, and `plugin_manager` with them, wherever nft-plugins is installed.
"""

from .cards import check_plugin
from .models import check_model
from .objectives import check_objective
from .pictures import builtin_batches, words
from .rewards import Checked, check_reward
from .solvers import check_solver

__all__ = [
    "Checked",
    "builtin_batches",
    "check_model",
    "check_objective",
    "check_plugin",
    "check_reward",
    "check_solver",
    "words",
]
