"""The kit as a pytest plug-in, and what the other files here leave open."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nft_plugins import RewardInfo, hookimpl, testing


@pytest.mark.parametrize(
    "name", ["check_plugin", "check_reward", "check_solver", "check_objective", "check_model"]
)
def test_the_checks_are_fixtures(name, request):
    assert request.getfixturevalue(name) is getattr(testing, name)


def test_the_plugin_manager_knows_the_hooks_and_is_fresh(plugin_manager):
    class Mine:
        @hookimpl
        def nft_register_rewards(self, register):
            register(RewardInfo("mine", "mine", dict))

    assert plugin_manager.get_plugins() == set()
    plugin_manager.register(Mine())
    cards = []
    plugin_manager.hook.nft_register_rewards(register=cards.append)
    assert [card.name for card in cards] == ["mine"]


def test_they_import_no_torch(tmp_path):
    """Every pytest run with nft-plugins installed loads them, whatever it tests."""
    fixtures = "check_plugin, check_reward, check_solver, check_objective, check_model, plugin_manager"
    test = (
        f"import sys\n\ndef test({fixtures}):\n    assert not {{'torch', 'numpy', 'PIL'}} & set(sys.modules)\n"
    )
    (tmp_path / "test_light.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_with_rules_has_its_mutants(kit):
    assert set(kit) == {"cards", "models", "objectives", "rewards", "solvers"}
