"""`nft rewards info` and `nft rewards check`: one reward, looked at closely."""

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

from ..errors import NftError, UsageError
from ..host.factories import OFFERED, find_annotation, import_factory
from ..host.host import Host, load_host
from ..quiet import redirect_prints, silence_libraries
from .listing import readiness
from .score import device_option, preset_name, preset_option, tiny_option
from .tables import as_json, cards, show

if TYPE_CHECKING:
    from nft_plugins import Reward

    from ..scoring.composer import Composed


@click.command()
@click.argument("name")
@as_json
def info(name: str, as_json: bool) -> None:
    """Show the whole card of a reward, with its options.

    Options are those of --reward NAME,KEY=VALUE.
    """
    with redirect_prints():  # Its module is imported.
        row = described(load_host(), name)
    if as_json:
        click.echo(json.dumps(row, indent=2, default=str))
        return
    click.echo(f"{row['name']}: {row['summary']}\n")
    facts = {k: v for k, v in row.items() if k not in ("name", "summary", "options", "doc", "install")}
    facts["ready"] = "yes" if row["ready"] else f"no: {row['install']}"
    for key, value in facts.items():
        text = "; ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        click.echo(f"{key:<13} {text or '-'}")
    click.echo()
    if isinstance(row["options"], str):
        click.echo(f"options: not known, for the factory cannot be imported: {row['options']}")
    elif row["options"]:
        rows = [
            {**o, "default": "required" if o["required"] else written(o["default"])} for o in row["options"]
        ]
        show(rows, {"name": "option", "type": "type", "default": "default"}, False)
    else:
        click.echo("It has no options.")
    if row["doc"]:
        click.echo(f"\n{row['doc']}")


def described(host: Host, name: str) -> dict[str, Any]:
    """A reward's card, its options, its factory's docstring and whether it is ready.

    `options` is the error's text where the factory cannot be imported.
    """
    card = host.find_reward(name)
    (row,) = cards({name: card})
    row |= {"distribution": card.distribution, "factory": card.info.factory if card.owners else name}
    row |= readiness(card)
    try:
        factory = import_factory(card.info.factory)
        return row | {"options": options(factory), "doc": inspect.getdoc(factory) or ""}
    except NftError as error:
        return row | {"options": str(error), "doc": ""}


def options(factory: Callable[..., Any]) -> list[dict[str, Any]]:
    """Name, type and default of a factory's options."""
    rows = []
    for name, p in inspect.signature(factory).parameters.items():
        if name in OFFERED or p.kind not in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD):
            continue
        option = {
            "name": name,
            "type": type_text(find_annotation(factory, name)),
            "required": p.default is p.empty,
        }
        rows.append(option | {"default": None if option["required"] else p.default})
    return rows


def type_text(kind: Any) -> str:
    """A type as the command line takes it: `nft | strict`, `str | none`."""
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(type_text(member) for member in typing.get_args(kind))
    if kind in (type(None), Any):
        return "none" if kind is not Any else "any"
    return str(kind) if typing.get_args(kind) else getattr(kind, "__name__", str(kind))


def written(value: Any) -> str:
    """A value as the command line takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@click.command()
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@tiny_option
@preset_option
@device_option
@click.option(
    "--expect",
    metavar="FILE.jsonl",
    type=click.Path(path_type=Path),
    help='Known values: lines {"image": PATH, "prompt": TEXT, "value": NUMBER or null if invalid}.',
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="By how much equal scores may differ, in all and as a share.  [default: 0.001; on a GPU 0.02]",
)
def check(
    name: str,
    options: tuple[str, ...],
    tiny: bool,
    preset: str | None,
    device: str,
    expect: Path | None,
    tolerance: float | None,
) -> None:
    """Load a reward and hold it to the contract, on images made by code.

    Options are those of --reward NAME,KEY=VALUE, here apart: nft rewards check ocr upscale=4.
    """
    from ..runs.inputs import load_rewards, make_run_settings, parse_rewards
    from ..runs.setup import pick_device
    from ..scoring.composer import Composed, Term

    host = load_host()
    spec = ",".join((name, *options))
    settings = make_run_settings(host, preset_name(tiny, preset), {"rewards": [spec], "device": device})
    specs = parse_rewards(settings, host)
    known = read_known(expect) if expect else {}
    place = pick_device(settings.device)
    silence_libraries("transformers")
    start = time.monotonic()
    composed = load_rewards(specs, host, place, settings.reward_defaults)
    if len(composed.terms) > 1 or composed.constant:  # A file's composition is checked as one reward.
        composed = Composed((Term(name.rpartition(":")[2], 1.0, composed),))
    reward = cast("Reward", composed.terms[0].reward)  # By now it is loaded, whatever a file only named.
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
    show(rows, {"image": "image made by code", "size": "size", "value": name}, False)
    for sentence in result.holds:
        click.echo(f"ok: {sentence}")
    if expect:
        click.echo(f"ok: {compare(known, composed, 1e-3 if tolerance is None else tolerance, str(place))}")
    else:
        click.echo("not checked: known values. None are shipped; --expect FILE.jsonl compares with yours.")
    click.echo("not checked: whether bigger means better, and other devices, sizes and precisions.")


def read_known(file: Path) -> dict[Path, tuple[str, Mapping[str, Any], float | None]]:
    """Prompt, metadata and value by image, of a file in the form of `nft score --prompts` with a `value`."""
    from ..scoring.items import read_prompt_lines

    known: dict[Path, tuple[str, Mapping[str, Any], float | None]] = {}
    for path, line in read_prompt_lines(file).items():
        metadata = dict(line.metadata)
        value = metadata.pop("value", "")
        if isinstance(value, bool) or not (value is None or isinstance(value, (int, float))):
            raise UsageError(f'{line.where}: expected "value", a number, or null for an invalid image.')
        known[path] = (line.text, metadata, value)
    return known


def compare(
    known: Mapping[Path, tuple[str, Mapping[str, Any], float | None]],
    reward: Composed,
    tolerance: float,
    device: str,
) -> str:
    """What agrees, in a sentence. Raises NftError with every image that does not."""
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
                wrong.append(f"{result.item.path}: expected {shown(value)}, got {shown(got)}")
        else:
            furthest = max(furthest, abs(got - value))
            if not math.isclose(got, value, rel_tol=tolerance, abs_tol=tolerance):
                wrong.append(f"{result.item.path}: expected {value:.6g}, got {got:.6g}")
    if wrong:
        raise NftError(f"{len(wrong)} of {len(known)} known values differ: {'; '.join(wrong)}.")
    return f"{len(known)} known values agree, the furthest within {furthest:.2g}"


def shown(value: float | None) -> str:
    return "invalid" if value is None else f"{value:.6g}"
