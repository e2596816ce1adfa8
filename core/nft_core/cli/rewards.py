"""`nft rewards info` shows one reward, and `nft rewards check` tests it."""

from __future__ import annotations

import inspect
import json
import time
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from nft_plugins.rules import OFFERED

from ..errors import NftError, UsageError
from ..host.factories import find_annotation, import_factory
from ..host.host import Host, load_host
from ..quiet import redirect_prints, silence_libraries
from .listing import describe_readiness
from .score import choose_preset, device_option, preset_option, tiny_option
from .tables import describe_cards, json_option, show_rows

if TYPE_CHECKING:
    from nft_plugins import Reward

    from ..scoring.composer import Composed


@click.command("info")
@click.argument("name")
@json_option
def show_reward(name: str, as_json: bool) -> None:
    """Show the definition, source, licence and options of a reward.

    Give it options with --reward NAME,KEY=VALUE. NAME is one that `nft rewards` lists, or FILE.py:FUNCTION.
    """
    with redirect_prints():  # The reward's module is imported, and may print.
        row = describe_reward(load_host(), name)
    if as_json:
        click.echo(json.dumps(row, indent=2, default=str))
        return
    click.echo(f"{row['name']}: {row['summary']}\n")
    facts = {k: v for k, v in row.items() if k not in ("name", "summary", "options", "doc", "install")}
    facts["environment"] = [write_environment(each) for each in row["environment"]]
    facts["ready"] = "yes" if row["ready"] else f"no: {row['install']}"
    for key, value in facts.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        text = "; ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        click.echo(f"{key:<13} {text or '-'}")
    click.echo()
    if isinstance(row["options"], str):
        click.echo(f"Its options are not known, because its module cannot be imported: {row['options']}")
    elif row["options"]:
        rows = [
            {**o, "default": "required" if o["required"] else write_option(o["default"])}
            for o in row["options"]
        ]
        show_rows(rows, {"name": "option", "type": "type", "default": "default"}, False)
    else:
        click.echo("It has no options.")
    if row["doc"]:
        click.echo(f"\n{row['doc']}")


def describe_reward(host: Host, name: str) -> dict[str, Any]:
    """Describe a reward by its card, its options, its factory's docstring and whether it is ready.

    `options` is the error's text if the factory cannot be imported.
    """
    card = host.find_reward(name)
    (row,) = describe_cards({name: card})
    row |= {"distribution": card.distribution, "factory": card.info.factory if card.owners else name}
    row |= describe_readiness(card)
    try:
        factory = import_factory(card.info.factory)
        return row | {"options": list_options(factory), "doc": inspect.getdoc(factory) or ""}
    except NftError as error:
        return row | {"options": str(error), "doc": ""}


def write_environment(environment: Mapping[str, Any]) -> str:
    """Write an environment in a line: its name, when it is needed, and what is in it."""
    options = ",".join(f"{key}={value}" for key, value in environment["options"].items())
    when = f" (for {options})" if options else ""
    parts = [f"Python {environment['python'] or '>=3.9'}", *environment["requirements"], *environment["system"]]
    return f"{environment['name']}{when}: {', '.join(parts)}"


def list_options(factory: Callable[..., Any]) -> list[dict[str, Any]]:
    """List the options of a factory: their names, types and defaults."""
    rows = []
    for name, p in inspect.signature(factory).parameters.items():
        # What the host gives, such as the device, is no option of the user's.
        if name in OFFERED or p.kind not in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD):
            continue
        option = {
            "name": name,
            "type": write_type(find_annotation(factory, name)),
            "required": p.default is p.empty,
        }
        rows.append(option | {"default": None if option["required"] else p.default})
    return rows


def write_type(kind: Any) -> str:
    """Write a type as the values that the command line takes, such as `nft | strict` or `str | none`."""
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(write_type(member) for member in typing.get_args(kind))
    if kind in (type(None), Any):
        return "none" if kind is not Any else "any"
    return str(kind) if typing.get_args(kind) else getattr(kind, "__name__", str(kind))


def write_option(value: Any) -> str:
    """Write a value as the command line takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@click.command("check")
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@tiny_option
@preset_option
@device_option
@click.option(
    "--expect",
    metavar="FILE.jsonl",
    type=click.Path(path_type=Path),
    help='Compare with known scores, from a file of lines {"image": PATH, "prompt": TEXT, "value": NUMBER}, '
    "with null for an image that must be invalid; paths are relative to the file.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest difference of two scores that count as equal, as a number and as a share of the score; "
    "a higher value is less strict.  [default: 0.001; on a GPU 0.02]",
)
def check_contract(
    name: str,
    options: tuple[str, ...],
    tiny: bool,
    preset: str | None,
    device: str,
    expect: Path | None,
    tolerance: float | None,
) -> None:
    """Check that a reward keeps the contract of all rewards.

    It loads the reward and scores images that are made by code. The contract says, for example, that the score
    of an image does not depend on the other images of a batch. Options of the reward follow its name, such as
    in `nft rewards check ocr upscale=4`. It exits with 1 if the reward breaks the contract.
    """
    from ..runs.inputs import load_rewards, make_run_settings, parse_rewards
    from ..runs.setup import pick_device

    host = load_host()
    spec = ",".join((name, *options))
    settings = make_run_settings(host, choose_preset(tiny, preset), {"rewards": [spec], "device": device})
    specs = parse_rewards(settings, host)
    for each in specs:
        host.check_reward_options(each.name, each.options)
    from ..scoring.composer import Composed, Term  # It imports PyTorch.

    known = read_known_values(expect) if expect else {}  # A mistake in it is told before weights are loaded.
    place = pick_device(settings.device)
    silence_libraries("transformers")
    start = time.monotonic()
    composed = load_rewards(specs, host, place, settings.reward_defaults)
    if len(composed.terms) > 1 or composed.constant:
        # A file may name a sum of rewards, which is one reward to its users.
        composed = Composed((Term(name.rpartition(":")[2], 1.0, composed),))
    # A file may name a reward that is loaded later; `load_rewards` has done so.
    reward = cast("Reward", composed.terms[0].reward)
    click.echo(f"loaded in {time.monotonic() - start:.1f} s, on {place}")

    from nft_plugins.testing import check_reward

    try:
        result = check_reward(reward, tolerance=tolerance, device=str(place))
    except AssertionError as error:
        raise NftError(f"The reward {name!r} does not keep the contract: {error}.") from error
    rows = [
        {
            "image": prompt,
            "size": f"{batch.images.shape[3]} x {batch.images.shape[2]}",
            "value": f"{value:.4g}" if valid else "invalid",
        }
        for batch, scores in result.scored
        for prompt, value, valid in zip(
            batch.prompts, scores.values.tolist(), scores.valid.tolist(), strict=True
        )
    ]
    show_rows(rows, {"image": "image made by code", "size": "size", "value": name}, False)
    for sentence in result.holds:
        click.echo(f"ok: {sentence}")
    if expect:
        click.echo(
            f"ok: {compare_values(known, composed, 1e-3 if tolerance is None else tolerance, str(place))}"
        )
    else:
        click.echo("not checked: known values. None are shipped; --expect FILE.jsonl compares with yours.")
    # No test can know these; whoever reads "ok" should not believe that they were tested.
    click.echo("not checked: whether bigger means better, and other devices, sizes and precisions.")


def read_known_values(file: Path) -> dict[Path, tuple[str, Mapping[str, Any], float | None]]:
    """Read prompt, metadata and known score by image, from a file like that of `nft score --prompts`.

    Raises UsageError for a line without a `value`.
    """
    from ..scoring.items import read_prompt_lines

    known: dict[Path, tuple[str, Mapping[str, Any], float | None]] = {}
    for path, line in read_prompt_lines(file).items():
        metadata = dict(line.metadata)
        value = metadata.pop("value", "")
        if isinstance(value, bool) or not (value is None or isinstance(value, (int, float))):
            raise UsageError(f'{line.where}: expected "value", a number, or null for an invalid image.')
        known[path] = (line.text, metadata, value)
    return known


def compare_values(
    known: Mapping[Path, tuple[str, Mapping[str, Any], float | None]],
    reward: Composed,
    tolerance: float,
    device: str,
) -> str:
    """Compare scores with known ones, and say how well they agree. Raises NftError with all that do not."""
    import math

    from ..scoring.images import score_images

    prompts, metadata, values = zip(*known.values(), strict=True)
    name = reward.terms[0].name
    results = score_images(known, prompts, reward, metadata=metadata, device=device)
    wrong, furthest = [], 0.0
    for result, value in zip(results, values, strict=True):
        got = result.values[name]
        if name in result.errors:
            wrong.append(result.errors[name])
        elif got is None or value is None:
            if got is not value:
                wrong.append(f"{result.item.path}: expected {format_value(value)}, got {format_value(got)}")
        else:
            furthest = max(furthest, abs(got - value))
            if not math.isclose(got, value, rel_tol=tolerance, abs_tol=tolerance):
                wrong.append(f"{result.item.path}: expected {value:.6g}, got {got:.6g}")
    if wrong:
        raise NftError(f"{len(wrong)} of {len(known)} known values differ: {'; '.join(wrong)}.")
    return f"{len(known)} known values agree, the furthest within {furthest:.2g}"


def format_value(value: float | None) -> str:
    """Write a score, or `invalid` for None."""
    return "invalid" if value is None else f"{value:.6g}"
