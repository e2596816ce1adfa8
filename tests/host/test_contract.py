"""The public contract changes only together with its version, the changelog and `contract.txt`.

`python tests/host/test_contract.py` writes `contract.txt` anew.
"""

import dataclasses
import hashlib
import inspect
import re
from pathlib import Path

import nft_plugins
from nft_plugins import hookspecs, testing

HERE = Path(__file__).parent
FILE = HERE / "contract.txt"
CHANGELOG = HERE.parents[1] / "CHANGELOG.md"


def contract():
    """A line for each name, field, method, hook and check that a plug-in may rely on."""
    hooks = [f"hook {n}{signature(f)}" for n, f in vars(hookspecs).items() if n.startswith("nft_")]
    names = [
        line for name in sorted(nft_plugins.__all__) for line in described(name, getattr(nft_plugins, name))
    ]
    kit = [
        line
        for name in sorted(testing.__all__)
        for line in described(f"testing.{name}", getattr(testing, name))
    ]
    return "\n".join([*names, *sorted(hooks), *kit]) + "\n"


def described(name, what):
    if inspect.isclass(what):
        lines = [f"class {name}"]
        if dataclasses.is_dataclass(what):
            lines += [
                f"  {f.name}: {f.type}{' = ...' if has_default(f) else ''}" for f in dataclasses.fields(what)
            ]
        else:
            kinds = inspect.get_annotations(what).items()
            lines += [f"  {field}: {getattr(kind, '__forward_arg__', kind)}" for field, kind in kinds]
        methods = [n for n in vars(what) if not n.startswith("_") or n == "__call__"]
        return lines + [f"  {n}{signature(m)}" for n in sorted(methods) if (m := function(vars(what)[n]))]
    if inspect.isroutine(what):
        return [f"def {name}{signature(what)}"]
    return [f"{name}" if name == "CONTRACT" else f"{name} = {what!r}" if isinstance(what, str) else name]


def has_default(field):
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def function(member):
    """The function of a method or a property; None for a field's default."""
    inner = (
        getattr(member, "__func__", None) or getattr(member, "func", None) or getattr(member, "fget", member)
    )
    return inner if inspect.isfunction(inner) else None


def signature(function):
    return str(inspect.signature(function))


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


HOW = (
    "The public contract has changed. Where something is new, raise the minor version in nft_plugins.CONTRACT; "
    "where something is gone or means something else, the major one, after a minor one in which its use raised "
    "ContractDeprecation. Then say so in CHANGELOG.md, in an entry that begins "
    "'- Contract {version} ({digest}):', and write contract.txt anew with "
    "`python tests/host/test_contract.py`. The difference:\n{difference}"
)


def test_the_contract_changes_with_an_entry_in_the_changelog():
    now, before = contract(), FILE.read_text(encoding="utf-8")
    gone = [f"- {line}" for line in before.splitlines() if line not in now.splitlines()]
    new = [f"+ {line}" for line in now.splitlines() if line not in before.splitlines()]
    told = HOW.format(version=nft_plugins.CONTRACT, digest=digest(now), difference="\n".join(gone + new))
    assert now == before, told
    assert f"- Contract {nft_plugins.CONTRACT} ({digest(now)}):" in CHANGELOG.read_text(encoding="utf-8"), told


def test_the_description_sees_every_kind_of_change():
    lines = contract().splitlines()
    for line in (
        "class Batch",
        "  images: Tensor",
        "  shared(self, key: 'Hashable', compute: 'Callable[[], T]') -> 'T'",
        "class RewardInfo",
        "  summary: str",
        "  extra: str = ...",
        "class Reward",
        "  __call__(self, batch: 'Batch') -> 'Scores'",
        "hook nft_checkpoint_saved(run: 'Run', folder: 'Path') -> 'None'",
        "def randn_like(x: 'Tensor', generator: 'Generator') -> 'Tensor'",
        "ENTRY_POINT_GROUP = 'nft_plugins'",
    ):
        assert line in lines


def test_built_ins_say_which_contract_they_were_written_for():
    import nft_core.plugin
    import nft_objectives.plugin
    import nft_recipes.plugin
    import nft_rewards.plugin
    import nft_solvers.plugin
    import nft_tiny.plugin

    modules = (nft_core, nft_objectives, nft_recipes, nft_rewards, nft_solvers, nft_tiny)
    for module in (each.plugin for each in modules):
        assert re.fullmatch(r"\d+\.\d+", module.CONTRACT)


if __name__ == "__main__":
    FILE.write_text(contract(), encoding="utf-8")
    print(f"- Contract {nft_plugins.CONTRACT} ({digest(contract())}):")
