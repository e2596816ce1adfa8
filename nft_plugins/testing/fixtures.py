"""A pytest plug-in: the checks as fixtures. Every pytest run here loads it, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import pluggy


@pytest.fixture
def check_reward() -> Callable[..., Any]:
    """`nft_plugins.testing.check_reward`."""
    from . import check_reward

    return check_reward


@pytest.fixture
def check_solver() -> Callable[..., Any]:
    """`nft_plugins.testing.check_solver`."""
    from . import check_solver

    return check_solver


@pytest.fixture
def check_objective() -> Callable[..., Any]:
    """`nft_plugins.testing.check_objective`."""
    from . import check_objective

    return check_objective


@pytest.fixture
def check_model() -> Callable[..., Any]:
    """`nft_plugins.testing.check_model`."""
    from . import check_model

    return check_model


@pytest.fixture
def check_plugin() -> Callable[..., Any]:
    """`nft_plugins.testing.check_plugin`."""
    from . import check_plugin

    return check_plugin


@pytest.fixture
def plugin_manager() -> pluggy.PluginManager:
    """A fresh plug-in manager that knows nft-hub's hooks and no plug-in."""
    from .cards import fresh_manager

    return fresh_manager()
