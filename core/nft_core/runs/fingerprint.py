"""What a run's figures depend on beside its weights: like is compared with like, and changes are named."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host.local import is_reference
from ..host.objects import is_object_name
from ..host.specs import RewardSpec, split_options
from ..settings import Settings, for_evaluation
from ..settings.places import find_packages
from .places import shorten_path, shorten_paths

if TYPE_CHECKING:
    from ..host.discovery import Registered
    from ..host.host import Host
    from ..models.sources import ModelSource
    from ..prompts import Prompt
    from ..scoring.composed import Composed

#: Settings that an evaluation's pictures depend on.
OF_PICTURES = (
    *("seed", "eval_images", "solver", "solver_options", "steps", "resolution", "model_options", "family"),
    *("max_sequence_length", "precision", "decode_precision"),
)
#: Parts of an evaluation's fingerprint that depend on rewards alone.
OF_SCORES = ("rewards", "total")
#: Bytes that are read of a file of weights, at its start, in its middle and at its end.
SAMPLE = 4096
#: Distributions that results depend on, beside those that bring plug-ins.
BENEATH = ("torch", "diffusers", "transformers")


def fingerprint_evaluation(
    settings: Settings,
    held_out: Sequence[Prompt],
    specs: Sequence[RewardSpec],
    host: Host,
    sources: Mapping[str, str],
    **resolved: str,
) -> dict[str, Any]:
    """Make an evaluation's fingerprint, all text: what its pictures depend on, `rewards`, and their `total`.

    Means under the same fingerprint differ by the weights alone. Where files lie is no part of it.
    sources: of `collect_sources`.
    resolved: settings of OF_PICTURES that leave the choice to the machine, as chosen.
    """
    from .setup import find_model

    # Solver, steps and size of evaluations, which may differ from those of rollouts.
    its = for_evaluation(settings)
    values = shorten_paths(its.model_dump(mode="json")) | resolved
    chosen = {name: values[name] for name in OF_PICTURES} | {"model": digest_model(find_model(settings).base)}
    if its.eval_guidance != 1:  # Lines of older versions have no guidance.
        chosen["guidance"] = its.eval_guidance
    group, colon, _ = its.solver.partition(":")
    chosen["solver"] = [
        chosen["solver"],
        identify_source(its.solver, host.solvers.get(group + colon), sources),
    ]
    chosen["family"] = [chosen["family"], identify_source("", host.models.get(chosen["family"]), sources)]
    by_title: dict[str, list[Any]] = {}
    for spec in specs:
        # A reward may be made of others, which its options name.
        inner = [str(v).partition(",")[0].partition("=")[0] for v in spec.options.values()]
        made_of = [identify_source(n, host.rewards.get(n), sources) for n in (str(spec.name), *inner)]
        options = [spec.options, *(split_options(settings.reward_defaults.get(n, {}))[1] for n in inner)]
        given = [{k: shorten_path(str(v)) for k, v in each.items()} for each in options]
        by_title.setdefault(spec.title, []).append([shorten_path(str(spec.name)), given, made_of])
    return {
        "prompts": digest_value([[p.text, p.metadata] for p in held_out]),
        **{name: v if isinstance(v, str) else json.dumps(v, default=str) for name, v in chosen.items()},
        "rewards": {title: digest_value(given) for title, given in by_title.items()},
        # A sum is a sum in runs of older versions too.
        "total": digest_value([by_title, [spec.weight for spec in specs], *({settings.combine} - {"sum"})]),
    }


def identify_source(name: str, card: Registered[Any] | None, sources: Mapping[str, str]) -> str:
    """Say what brings a reward or a solver: a plug-in and its version, the user's files or code, or nothing."""
    if is_object_name(name) and card is not None:
        return str(card.info.source)
    if card is not None:
        return f"{card.distribution} {sources.get(card.distribution, '')}"
    return (
        str([(path.name, digest_file(path)[:12]) for path in find_source_files(name)])
        if is_reference(name)
        else ""
    )


def digest_model(name: str) -> str:
    """Name a model: a hub id as it is, a folder by its name and a digest of its files."""
    folder = Path(name)
    return f"{folder.name} {digest_weights(folder)}" if folder.is_dir() else name


def digest_weights(place: Path) -> str:
    """Make a digest of a file of weights, or of a folder's, by their sizes and samples of their bytes."""
    digest = hashlib.sha256()
    files = [p for p in place.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file()]
    for path in sorted(files) if place.is_dir() else [place]:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place)} {size}".encode())
        with path.open("rb") as file:  # Weights are large, and other ones differ nearly everywhere.
            for start in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:12]


def digest_origin(source: ModelSource) -> dict[str, str]:
    """Make digests of the weights and LoRAs that stand on a model's pipeline, wherever they lie."""
    found = {f"LoRA {number}": digest_file(lora.file)[:12] for number, lora in enumerate(source.loras, 1)}
    if source.transformer:
        found["the transformer's weights"] = digest_weights(source.transformer)
    if source.file and source.file != source.transformer:  # Its VAE and text encoders.
        found["the single file's weights"] = digest_weights(source.file)
    return found


def digest_value(value: Any) -> str:
    """Make a few letters of a value, which differ where the value does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def pick_picture_part(evaluation: Any) -> dict[str, Any]:
    """Pick the part of a fingerprint that pictures depend on; it is empty for a line of an older version."""
    given = evaluation if isinstance(evaluation, Mapping) else {}
    return {name: value for name, value in given.items() if name not in OF_SCORES}


def list_changes(before: Any, now: Any) -> list[str]:
    """List the names of what differs between two fingerprints, and of rewards that do."""
    if not before or not now:
        return [] if before == now else ["what it was in an older version is not known"]
    a, b = (
        {**pick_picture_part(e), **{f"reward {n}": v for n, v in read_reward_digests(e).items()}}
        for e in (before, now)
    )
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if not names and read_total_digest(before) != read_total_digest(now):
        return ["weights of rewards, or combine"]
    return names  # A total of other rewards is another one in any case.


def is_comparable(before: Any, now: Any, name: str) -> bool:
    """Say whether a figure can differ between two evaluations by the weights alone."""
    return pick_picture_part(before) == pick_picture_part(now) and identify_figure(
        before, name
    ) == identify_figure(now, name)


def read_reward_digests(evaluation: Any) -> Mapping[str, str]:
    found = evaluation.get("rewards") if isinstance(evaluation, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def read_total_digest(evaluation: Any) -> Any:
    return evaluation.get("total") if isinstance(evaluation, Mapping) else None


def identify_figure(evaluation: Any, name: str) -> Any:
    """Find the digest of what a figure of an evaluation depends on beside its pictures.

    name: of a reward, of its detail, `REWARD/DETAIL`, or `total`.
    """
    title = name.partition("/")[0].partition(":")[0]
    return read_total_digest(evaluation) if name == "total" else read_reward_digests(evaluation).get(title)


def collect_sources(
    host: Host, references: Iterable[str] = (), reward: Composed | None = None
) -> dict[str, str]:
    """Collect versions of plug-ins and of what is beneath them, and digests of the user's files, by name.

    references: names of the run's rewards, solver and objective, of which some are `FILE.py:NAME`,
        `MODULE:NAME` or stand for Python objects.
    reward: of which versions are collected too where it runs in another process or on a server.
    """
    found = {row.distribution: row.version for row in host.plugins if row.status == "ok"}
    references = list(references)
    own: dict[str, Registered[Any]] = {**host.rewards, **host.objectives}
    found |= {name: own[name].info.source for name in references if is_object_name(name)}
    for name in BENEATH:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    files: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for r in references if is_reference(r) for path in find_source_files(r)):
        files.setdefault(path.name, []).append(digest_file(path)[:12])
    found |= {name: " ".join(sorted(digests)) for name, digests in files.items()}
    return found | (collect_remote_sources(reward) if reward else {})


def collect_remote_sources(reward: Composed) -> dict[str, str]:
    """Collect versions of what rewards in other processes and on servers compute with, by name."""
    from ..remote.reward import ChildReward
    from ..remote.served import ServedReward
    from ..scoring.composed import Mapped

    found: dict[str, str] = {}
    for term in reward.terms:
        inner = getattr(term.reward, "reward", term.reward)  # Behind what guards it.
        if isinstance(inner, Mapped):
            found |= collect_remote_sources(inner.inner)
        elif isinstance(inner, (ChildReward, ServedReward)):
            found |= inner.list_versions()
    return found


def find_source_files(reference: str) -> list[Path]:
    """Find a reference's files: the file and imported modules beside it, or, of a module, its package's."""
    location, _, _ = reference.rpartition(":")
    modules = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    paths = {
        name: Path(file) for name, file in modules.items() if isinstance(file, str) and file.endswith(".py")
    }
    if location.endswith(".py"):
        own = Path(location).resolve()
        installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
        used = {own} | {
            path
            for name, path in paths.items()
            # Others that were given by their path are rewards of their own.
            if path.is_relative_to(own.parent)
            and not name.startswith("nft_local:")
            # A plug-in that is being developed there has a version of its own.
            and name.partition(".")[0] not in find_packages()
            and not any(path.is_relative_to(place) for place in installed)
        }
    else:
        used = {path for name, path in paths.items() if name.partition(".")[0] == location.partition(".")[0]}
    return sorted(path for path in used if path.is_file())


def digest_file(path: Path) -> str:
    """Compute the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_sources(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List in words which versions and which of the user's files have changed; what one lacks is left out."""
    return [
        f"{name} is another file" if name.endswith(".py") else f"{name} {before[name]} then, {now[name]} now"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
