"""A protocol: all that an evaluation's figures depend on beside the models, written down and repeatable."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Literal, TypeAlias

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UsageError, unknown_name
from ..host.specs import RewardSpec
from ..prompts import Prompt, read_prompts
from ..runs.fingerprint import digest_value
from ..runs.places import make_paths_whole, shorten_path, shorten_paths
from ..scoring.composer import Composed
from ..settings import Settings, make_settings
from ..settings.files import TOML_ERRORS
from ..settings.groups import Count, CountOrZero, NotNegative
from ..settings.settings import explain_error

#: Of the file's layout, and of what its words mean.
VERSION = 1
FILE, PROMPTS = "protocol.toml", "prompts.jsonl"
#: Where results of evaluations are kept, in the folder that the command is called from.
RESULTS = Path("evaluations")
Chosen = Literal["fp32", "bf16", "fp16"]
#: A reward as it is handed to `compose`.
GivenReward: TypeAlias = "RewardSpec | Composed"


class Protocol(BaseModel):
    """Holds how models are evaluated, so that others can be measured in the same way.

    prompts_digest: of the prompts' texts and metadata, which stand beside the protocol in `prompts.jsonl`.
    images: of each prompt. Each has noise of its own, from the seed and the numbers of prompt and image.
    guidance: one value or several, each evaluated by itself. resolution: 0 is each model's own.
    rewards: tables with `name`, `weight` and options. reward_defaults: as the setting.
    versions: of plug-ins, and digests of the user's files.
    defaults: where values that nobody gave came from; empty where from the settings' own defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    prompts_digest: str
    prompts_count: Count
    images: Count
    seed: CountOrZero
    solver: str
    steps: Count
    guidance: list[NotNegative]
    negative_prompt: str = ""
    resolution: CountOrZero
    precision: Chosen
    decode_precision: Chosen
    max_sequence_length: CountOrZero
    family: str = ""
    solver_options: dict[str, Any] = {}
    model_options: dict[str, Any] = {}
    rewards: list[dict[str, Any]]
    reward_defaults: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    defaults: str = ""

    def fingerprint(self) -> str:
        """Make a digest that differs where figures may differ for another reason than the model.

        Where files lie and values came from is no part of it, and no more are versions, which `list_changes`
        compares.
        """
        return digest_value(self.comparable())

    def comparable(self) -> dict[str, Any]:
        """Return what two protocols are compared by, without the places of files."""
        values = shorten_paths(self.model_dump(mode="json", exclude={"versions", "version", "defaults"}))
        values["reward_defaults"] = {
            name: {key: shorten_path(v) if isinstance(v, str) else v for key, v in options.items()}
            for name, options in self.reward_defaults.items()
        }
        return values

    def apply(self, settings: Settings) -> Settings:
        """Give settings the protocol's values; the others, such as sizes of batches, stay."""
        named = {name: v for name, v in self.model_dump().items() if name in Settings.model_fields}
        # The dtype of weights follows from the precision alone, however a model was trained.
        more = {"eval_images": self.images, "eval_steps": self.steps, "lora_rank": 1}
        # Without its `reward_defaults`: tables of these are put together, and the protocol's count alone.
        return make_settings(settings.model_dump(exclude={"reward_defaults"}), named, more)


def describe_rewards(rewards: Sequence[GivenReward]) -> list[dict[str, Any]]:
    """Describe rewards as tables that a protocol's file can hold. What Python gave is told by its name."""
    return [
        {"name": spec.name if isinstance(spec.name, str) else f"{spec.title} (given in Python)"}
        | {"weight": spec.weight, **spec.options, **spec.guard.list_changes()}
        if isinstance(spec, RewardSpec)
        else {"name": f"{' + '.join(t.name for t in spec.terms)} (given in Python)", "weight": 1.0}
        for spec in rewards
    ]


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """Make a digest of the prompts' texts and metadata, in their order."""
    return digest_value([[p.text, p.metadata] for p in prompts])


def write_prompts(prompts: Sequence[Prompt]) -> str:
    """Write prompts as lines of JSON, which `read_prompts` reads back."""
    # `default=str` as in `digest_value`: what is read back has the same digest.
    lines = (json.dumps({"prompt": p.text, **p.metadata}, ensure_ascii=False, default=str) for p in prompts)
    return "".join(f"{line}\n" for line in lines)


def write_protocol(protocol: Protocol) -> str:
    """Write a protocol as TOML. Raises UsageError for an option that TOML cannot hold."""
    values = make_paths_whole(protocol.model_dump(mode="json"))
    try:
        return tomli_w.dumps(values)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "A protocol holds text, numbers, true, false, lists and tables; one of the options of the rewards, "
            f"the solver or the model is something else (for None write none): {error}."
        ) from error


def find_protocol(given: str) -> Path:
    """Find a protocol's file by its path, by a results folder, or by the name of one under ./evaluations."""
    for path in (Path(given), RESULTS / given):
        if (path / FILE).is_file():
            return path / FILE
        if path.is_file():
            return path
    names = [path.parent.name for path in RESULTS.glob(f"*/{FILE}")]
    raise unknown_name(
        "protocol",
        given,
        names,
        hint=f"Give a file {FILE}, a folder of results, or the name of a folder in {RESULTS}/.",
    )


def read_protocol(path: Path) -> tuple[Protocol, list[Prompt]]:
    """Read a protocol and the prompts beside it.

    Raises UsageError for a file that is none, of another version or with unknown keys, and for prompts that are
    not those that it was written for.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the protocol {path}: {error}.") from error
    except TOML_ERRORS as error:
        raise UsageError(f"The protocol {path} is not valid TOML: {error}.") from error
    protocol = check_protocol(values, path)
    file = path.with_name(PROMPTS)
    prompts = read_prompts(file)
    if digest_prompts(prompts) != protocol.prompts_digest:
        raise UsageError(
            f"{file} does not hold the prompts that {path} was written for: its digest is "
            f"{digest_prompts(prompts)}, expected {protocol.prompts_digest}. Put the file back, or begin a new "
            "evaluation with --prompts."
        )
    return protocol, prompts


def check_protocol(values: Mapping[str, Any], path: Path) -> Protocol:
    """Make a protocol of a file's values. Raises UsageError."""
    # Before all others: keys that another version has would be called unknown.
    if values.get("version") != VERSION:
        raise UsageError(
            f"{path} is a protocol of version {values.get('version', 'unknown')}, and nft-hub "
            f"{version_of('nft-hub')} reads version {VERSION}. Take the nft-hub that wrote it, or begin a new "
            "evaluation."
        )
    for name in values:
        if name not in Protocol.model_fields:
            raise unknown_name("key of a protocol", name, Protocol.model_fields, hint=f"It stands in {path}.")
    try:
        protocol = Protocol.model_validate(values)
    except ValidationError as error:
        said = "; ".join(explain_error(e) for e in error.errors()).replace("Setting ", "key ")
        raise UsageError(f"{path}: {said}") from error
    if not protocol.guidance:
        raise UsageError(f"{path}: key guidance is empty: expected one number or more, such as [1.0].")
    return protocol


def list_changes(before: Protocol, now: Protocol, unknown: Sequence[str] = ()) -> list[str]:
    """List in words what differs between two protocols. unknown: keys that are not known yet."""
    a, b = before.comparable(), now.comparable()
    changes = [f"{n} = {a[n]!r} then, {b[n]!r} now" for n in a if n not in unknown and a[n] != b[n]]
    if "versions" in unknown:
        return changes
    old, new = before.versions, now.versions
    return changes + [
        f"{n} {old.get(n, 'missing')} then, {new.get(n, 'missing')} now"
        for n in sorted({*old, *new})
        if old.get(n) != new.get(n)
    ]
