"""What a model brings along from the run that trained it: the defaults of `nft eval` and of `nft sample`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..host.host import Host
from ..host.local import is_reference
from ..models.run_folders import find_checkpoint, read_run_settings
from ..prompts import Prompt, keep_scorable
from ..remote.address import is_address
from ..runs.inputs import load_rewards, parse_rewards, read_prompt_files, split_held_out
from ..runs.places import find_places
from ..settings import Settings, for_evaluation, make_settings
from .entries import Model, shorten_name

#: Settings that a run's evaluations depend on.
OF_IMAGES = (
    *("seed", "solver", "solver_options", "steps", "resolution", "precision", "decode_precision"),
    *("max_sequence_length", "family", "model_options", "rollout_batch", "decode_batch", "attention"),
    *("eval_images", "eval_steps", "eval_solver", "eval_solver_options", "eval_guidance", "eval_resolution"),
    "merge_lora",
)
#: What a run chose its held-out prompts by.
OF_PROMPTS = ("prompts", "eval_prompts", "unscorable", "rewards", "reward_defaults")
#: Without these a model would be another one, so those of one run are never taken for another's model.
OF_MODEL = ("family", "model_options", "max_sequence_length")
#: Settings of a run's evaluation that figures depend on, beside those of the model.
NAMED = (
    *("seed", "solver", "solver_options", "eval_steps", "resolution", "precision", "decode_precision"),
    *("eval_images", "guidance", "prompts"),
)
#: Options of commands that decide, where two runs differ.
OPTIONS = {
    **{name: f"--{name}" for name in ("seed", "solver", "resolution", "guidance", "prompts")},
    **{"eval_images": "--images", "eval_steps": "--steps"},
}


@dataclass(frozen=True)
class Own:
    """What a model's run evaluates with.

    name: what the model is called. of_images: settings that pictures depend on, and of_prompts, those by which
    held-out prompts are chosen, both as the run has them. left_out: options of rewards that are not taken from
    a file.
    """

    name: str
    of_images: Mapping[str, Any]
    of_prompts: Mapping[str, Any]
    left_out: Sequence[str] = field(default=())

    def for_evaluation(self) -> dict[str, Any]:
        """Give the settings of the run's evaluations as an evaluation outside a run reads them."""
        s = for_evaluation(make_settings(self.of_images, self.of_prompts))
        names = (*OF_MODEL, "seed", "solver", "solver_options", "resolution", "precision", "decode_precision")
        more = ("eval_images", "rollout_batch", "decode_batch", "attention")
        kept = ("prompts", "eval_prompts", "unscorable", "reward_defaults")
        return {name: getattr(s, name) for name in (*names, *more, *kept)} | {"eval_steps": s.steps}

    def describe(self) -> dict[str, Any]:
        """Give what the figures of the run's evaluations depend on, for comparisons."""
        values = self.for_evaluation() | {"guidance": self.guidance}
        return values | {"prompts": values["eval_prompts"] or values["prompts"]}

    @property
    def guidance(self) -> float:
        """The guidance of the run's evaluations."""
        return float(self.of_images.get("eval_guidance", 1.0))

    @property
    def rewards(self) -> list[str]:
        """The names of the run's rewards, for messages."""
        given = self.of_prompts.get("rewards") or []
        return [str(r.get("name") if isinstance(r, Mapping) else r) for r in given]


def read_own(model: Model, host: Host, given: Iterable[str]) -> Own | None:
    """Read what a model, or else the LoRA on top of it, brings along; None where no run has trained them.

    given: settings that the user gives.
    Raises UsageError for a solver that is code in a file: nobody but the user says which code is run.
    """
    for path in filter(None, (model.model, model.lora)):
        checkpoint = find_checkpoint(Path(path).expanduser())
        if checkpoint is not None:
            # Paths inside the run's folder are written from there.
            found = find_places(read_run_settings(checkpoint), checkpoint.absolute().parent.parent)
            called = model.name or shorten_name(path)
            for setting in ("solver", "eval_solver"):
                # One that the user gives stands in for both, so code in the file is not run.
                if "solver" in given:
                    found.pop(setting, None)
                refuse_code(called, setting, str(found.get(setting, "")), host)
            defaults, left_out = keep_known_options(found.get("reward_defaults", {}), host)
            found["reward_defaults"] = defaults
            of_images = {name: found[name] for name in OF_IMAGES if name in found}
            of_prompts = {name: found[name] for name in OF_PROMPTS if name in found}
            return Own(called, of_images, of_prompts, left_out)
    return None


def refuse_code(called: str, setting: str, solver: str, host: Host) -> None:
    """Raise UsageError for a solver that is `FILE.py:NAME` or `MODULE:NAME`."""
    family, colon, _ = solver.partition(":")
    if is_reference(solver) and family + colon not in host.solvers:
        raise UsageError(
            f"The run of {called} evaluates with {setting} = {solver!r}, which is code that a run's file names "
            f"and is not run for that alone: give the solver, as in --solver {solver}."
        )


def keep_known_options(
    defaults: Mapping[str, Mapping[str, Any]], host: Host
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Keep the options of rewards that are safe to take from a file; also list those that are not kept.

    Numbers are kept, and texts that an installed preset gives too. Another text may name code, a server or a
    variable with a key.
    """
    presets = [preset.info.rewards for preset in host.presets.values()]
    kept: dict[str, dict[str, Any]] = {}
    left_out = []
    for reward, options in defaults.items():
        for name, value in options.items():
            known = any(given.get(reward, {}).get(name) == value for given in presets)
            if known or isinstance(value, int | float):
                kept.setdefault(reward, {})[name] = value
            else:
                left_out.append(f"{reward},{name}={value}")
    return kept, left_out


def read_all_own(models: Iterable[Model], host: Host, given: Iterable[str]) -> list[Own]:
    """Read what each of several models brings along; those that no run has trained bring nothing."""
    found = (read_own(m, host, given) for m in models)
    return [own for own in found if own is not None]


def describe_own(owns: Sequence[Own], given: Iterable[str]) -> list[str]:
    """Say in sentences that the first run's settings are the defaults, and in what other runs differ.

    given: settings that the user gives, on which defaults have no influence.
    Raises UsageError where the runs differ in what makes a model.
    """
    if not owns:
        return []
    first, *others = owns
    notes = [f"What is not given is as {name_defaults(first, None)}."]
    if first.left_out:
        notes.append(
            f"Options of rewards in that run's file are not taken from there: {'; '.join(first.left_out)}. "
            f"Give those that you trust, as in --reward {first.left_out[0]}."
        )
    a = first.describe()
    for other in others:
        b = other.describe()
        differ = [n for n in (*OF_MODEL, *NAMED) if n not in given and is_other(a[n], b[n])]
        if of_model := [n for n in differ if n in OF_MODEL]:
            said = "; ".join(f"{n} = {a[n]!r} and {b[n]!r}" for n in of_model)
            raise UsageError(
                f"{first.name} and {other.name} were trained with {said}: evaluate them one by one, or say "
                f"what holds for both, as in --set {of_model[0]}=..."
            )
        if differ:
            said = ", ".join(f"{n} = {b[n]!r} (here {a[n]!r})" for n in differ)
            flags = ", ".join(OPTIONS.get(n, f"--set {n}=...") for n in differ)
            notes.append(f"The run of {other.name} evaluates with {said}. All are alike here; {flags} decide.")
    return notes


def name_defaults(own: Own | None, preset: str | None) -> str:
    """Name what the values of settings that are not given are as; empty where nothing was named."""
    return f"the run of {own.name} evaluates" if own else f"the preset {preset} says" if preset else ""


def is_other(a: Any, b: Any) -> bool:
    """Tell whether two values differ, where files of the same content are the same."""
    if a == b:
        return False
    # Two runs have copies of their own of one file of prompts.
    files = [Path(v) for v in (a, b) if isinstance(v, str) and v and Path(v).is_file()]
    return len(files) < 2 or files[0].read_bytes() != files[1].read_bytes()


def require_rewards(settings: Settings, own: Own | None) -> None:
    """Raise UsageError where settings name no reward. own: of the first model, whose rewards are an example."""
    if settings.rewards:
        return
    trained = f"The run of {own.name} was trained on {', '.join(own.rewards)}. " if own else ""
    raise UsageError(
        f"An evaluation needs a reward: give --reward NAME, as in --reward pickscore. {trained}"
        "`nft rewards` lists them; FILE.py:FUNCTION is a reward of yours."
    )


def choose_held_out(settings: Settings, host: Host) -> list[Prompt]:
    """Choose the held-out prompts of a run as the run itself does, so that their numbers are the same."""
    prompts, held_out = read_prompt_files(settings, {})
    if settings.unscorable == "drop":  # Which of them are left out, the rewards alone know.
        import torch

        reward = load_rewards(
            parse_rewards(settings, host), host, torch.device("cpu"), settings.reward_defaults
        )
        held_out = keep_scorable(held_out, reward.find_refusals, "drop") if held_out else []
        prompts = prompts if held_out else keep_scorable(prompts, reward.find_refusals, "drop")
    return held_out or split_held_out(prompts, lambda text: None)[1]


def read_held_out_of_run(own: Own, host: Host) -> list[Prompt]:
    """Read the prompts that a run holds out, with those that an evaluation's own rewards may leave out.

    Raises UsageError where only the run's rewards could tell which these are, and they are code or on a server.
    """
    settings = make_settings(own.of_prompts)
    if held_out := read_prompt_files(settings, {})[1]:
        return held_out
    code = [name for name in own.rewards if is_reference(name) or is_address(name)]
    if settings.unscorable == "drop" and code:
        raise UsageError(
            f"Which prompts the run of {own.name} holds out depends on its reward {code[0]}, which is code "
            "or a server that a run's file names and is not asked for that alone: give --prompts FILE."
        )
    return choose_held_out(settings, host)
