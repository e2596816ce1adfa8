"""What an evaluation is asked for, checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..host.factories import import_factory
from ..host.host import Host
from ..host.specs import RewardSpec
from ..models.pipeline import PipelineModel
from ..prompts import Prompt, read_prompts
from ..quiet import silence_libraries
from ..runs.fingerprint import BENEATH, collect_sources
from ..runs.inputs import DATA
from ..runs.setup import (
    autocast_dtype,
    check_guidance,
    check_model,
    decode_dtype,
    find_family,
    image_shape,
    load_model,
    pick_device,
)
from ..settings import Settings, make_settings
from .entries import Entry, Model, list_entries
from .protocol import Chosen, GivenReward, Protocol, describe_rewards, digest_prompts

PRECISIONS: Mapping[torch.dtype | None, Chosen] = {
    None: "fp32",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
#: Tensors on it have shapes and no numbers, so that a model is made of its configs alone.
META = torch.device("meta")


@dataclass(frozen=True)
class Request:
    """An evaluation that can begin.

    settings: with the protocol's values. protocol: what is known of it before rewards are loaded: these may
    leave out prompts, and bring files whose digests belong to it.
    prompts: all that were given.
    notes: sentences for the user on where the settings came from.
    """

    settings: Settings
    protocol: Protocol
    entries: Sequence[Entry]
    rewards: Sequence[GivenReward]
    prompts: Sequence[Prompt]
    device: torch.device
    notes: Sequence[str] = ()

    def unknown(self) -> tuple[str, ...]:
        """Name what of the protocol is not known yet."""
        of_prompts = ("prompts_digest", "prompts_count") if self.settings.unscorable == "drop" else ()
        return ("versions", *of_prompts)

    def complete_protocol(self, prompts: Sequence[Prompt], host: Host) -> Protocol:
        """Complete the protocol, now that rewards are loaded and have chosen the prompts."""
        family = find_family(use_model(self.settings, self.entries[0]), host)[0]
        return self.protocol.model_copy(
            update={
                "prompts_digest": digest_prompts(prompts),
                "prompts_count": len(prompts),
                "versions": collect_versions(host, self.settings.solver, family, self.rewards),
            }
        )


def prepare_request(
    settings: Settings,
    host: Host,
    models: Sequence[Model],
    rewards: Sequence[GivenReward],
    prompts: Sequence[Prompt],
    guidance: Sequence[float] = (1.0,),
    negative_prompt: str = "",
    protocol: Protocol | None = None,
    notes: Sequence[str] = (),
    defaults: str = "",
) -> Request:
    """Check what is asked for. Raises UsageError and NftError; no weights are read.

    protocol: one that is to be repeated, whose values the settings have; without it one is made.
    notes, defaults: where settings that the user did not give came from, for the user and for the protocol.
    """
    silence_libraries("diffusers", "transformers")
    device = pick_device(settings.device)
    host.make_solver(settings.solver, settings.solver_options)
    if protocol is not None:
        guidance, negative_prompt = protocol.guidance, protocol.negative_prompt
    if negative_prompt and all(g == 1 for g in guidance):
        raise UsageError("A negative prompt counts under guidance alone: give --guidance too, such as 4.5.")
    if len(set(guidance)) < len(guidance):
        raise UsageError(f"The guidance {', '.join(f'{g:g}' for g in guidance)} names a value twice.")
    entries = list_entries(models, guidance)
    if not entries:
        raise UsageError("There is nothing to evaluate: give a model and a guidance.")
    for entry in entries:
        s = use_model(settings, entry)
        check_model(s, host)
        check_guidance(s, host, entry.guidance)
    settings = settings.model_copy(update={"resolution": find_resolution(settings, host, entries)})
    if protocol is None:
        protocol = draft_protocol(settings, device, rewards, prompts, guidance, negative_prompt)
        protocol = protocol.model_copy(update={"defaults": defaults})
    return Request(protocol.apply(settings), protocol, entries, rewards, prompts, device, notes)


def draft_protocol(
    s: Settings,
    device: torch.device,
    rewards: Sequence[GivenReward],
    prompts: Sequence[Prompt],
    guidance: Sequence[float],
    negative_prompt: str,
) -> Protocol:
    """Write down how models will be evaluated, as far as it is known before rewards are loaded."""
    return Protocol(
        prompts_digest=digest_prompts(prompts),
        prompts_count=len(prompts),
        images=s.eval_images,
        steps=s.eval_steps or s.steps,
        guidance=list(guidance),
        negative_prompt=negative_prompt,
        precision=PRECISIONS[autocast_dtype(s, device)],
        decode_precision=PRECISIONS[decode_dtype(s, device)],
        rewards=describe_rewards(rewards),
        **{
            name: getattr(s, name)
            for name in (
                *("seed", "solver", "solver_options", "resolution", "max_sequence_length"),
                *("family", "model_options", "reward_defaults"),
            )
        },
    )


def use_model(settings: Settings, entry: Entry) -> Settings:
    """Give settings the model of an entry."""
    lora = {"lora": entry.lora} if entry.lora else {}
    return make_settings(settings.model_dump(), {"model": entry.model, **lora})


def find_resolution(settings: Settings, host: Host, entries: Sequence[Entry]) -> int:
    """Find the side of all models' images, from their configs alone; 0 where that does not tell it.

    Raises UsageError for a size that is impossible, and for models whose own sizes differ.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for model in dict.fromkeys((e.model, e.lora) for e in entries):
        entry = next(e for e in entries if (e.model, e.lora) == model)
        s = use_model(settings, entry)
        factory = import_factory(host.models[find_family(s, host)[0]].info.factory)
        # A family of a plug-in may need more than configs: its size is seen when it is loaded.
        if not (isinstance(factory, type) and issubclass(factory, PipelineModel)):
            return settings.resolution
        sizes[entry.name] = image_shape(s, load_model(s, host, META))[:2]
    check_sizes(sizes)
    height, width = next(iter(sizes.values()))
    return height if height == width else settings.resolution


def check_sizes(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UsageError for models whose images differ in size."""
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{height} x {width} of {name}" for name, (height, width) in sizes.items())
        raise UsageError(
            f"The models' own images differ in size ({said}), and figures of different sizes are not compared: "
            f"give one for all, such as --resolution {min(min(size) for size in sizes.values())}."
        )


def collect_versions(host: Host, solver: str, family: str, rewards: Sequence[GivenReward]) -> dict[str, str]:
    """Collect the versions of what figures depend on: plug-ins in use, libraries, and the user's files."""
    specs = [reward for reward in rewards if isinstance(reward, RewardSpec) and isinstance(reward.name, str)]
    named = [str(text) for spec in specs for text in (spec.name, *spec.options.values())]
    # A reward may be made of others, which its options name.
    plain = [text.partition(",")[0].partition("=")[0] for text in named]
    group, colon, _ = solver.partition(":")
    cards: list[Any] = [host.rewards.get(name) for name in plain]
    cards += [host.solvers.get(group + colon), host.models.get(family)]
    used = {card.distribution for card in cards if card is not None}
    found = collect_sources(host, [solver, *named])
    return {n: v for n, v in sorted(found.items()) if n in used or n in BENEATH or n.endswith(".py")}


def read_held_out(settings: Settings) -> list[Prompt]:
    """Read the prompts that are held out, or those built in. Raises UsageError where a preset has none."""
    if settings.eval_prompts:
        return read_prompts(Path(settings.eval_prompts))
    if settings.prompts:
        raise UsageError(
            "There are no held-out prompts: the settings name prompts to train on alone. Give --prompts FILE, "
            "with prompts that nothing was trained on."
        )
    return read_prompts(DATA / "prompts-eval.txt")
