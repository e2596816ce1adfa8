"""`evaluate`: an evaluation in one call, which the command `nft eval` makes too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from ..errors import UsageError, name_arguments
from ..host.host import Host, load_host
from ..host.specs import RewardSpec
from ..prompts import Prompt, make_prompt, refuse_single_prompt
from ..runs.inputs import choose_preset, make_run_settings, parse_rewards
from ..scoring.composer import Composed, Given, as_spec
from ..settings import Settings
from .entries import Model, parse_model
from .folders import check_folder
from .own import describe_own, name_defaults, read_all_own, read_held_out_of_run, require_rewards
from .protocol import GivenReward, find_protocol, read_protocol
from .report import Evaluation
from .request import Request, prepare_request, read_held_out
from .running import Progress, run_evaluation

#: Images of each prompt, where nobody says how many.
IMAGES = 4
#: Settings that an evaluation reads and that its protocol holds.
OF_PROTOCOL = (
    *("seed", "eval_images", "eval_steps", "solver", "solver_options", "resolution", "precision"),
    *("decode_precision", "max_sequence_length", "family", "model_options", "reward_defaults", "rewards"),
    *("eval_prompts", "unscorable"),
)
#: Settings that an evaluation reads, and on which its figures do not depend.
FREE = (
    *("device", "processes", "rollout_batch", "decode_batch", "cache", "attention"),
    *("join_timeout", "peer_timeout"),
)


@name_arguments()
def evaluate(
    models: str | os.PathLike[str] | Model | Iterable[str | os.PathLike[str] | Model],
    rewards: Given | Iterable[Given] = (),
    *,
    prompts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | Prompt] | None = None,
    guidance: float | Sequence[float] | None = None,
    negative_prompt: str = "",
    protocol: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    tiny: bool = False,
    out: str | os.PathLike[str] | None = None,
    save_images: bool = False,
    host: Host | None = None,
    tell: Callable[[str], None] = lambda text: None,
    show: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> Evaluation:
    """Evaluate models under one protocol: `evaluate(["runs/a", "runs/b"], "pickscore").figures`.

    models: as `nft eval` takes them, or `Model(model, lora, name)`.
    rewards: what `nft_core.reward` takes, one or several; none where a protocol is given.
    What is not given is as in the evaluations of the first model's run, or else as in the preset.
    prompts: a file, or texts, or mappings with `prompt` and metadata; None takes those held out by that run or
        preset, or those built in.
    guidance: one scale of classifier-free guidance, or several, each evaluated by itself. 1 is without.
    protocol: an earlier one to repeat: its file, or the folder of its results.
    tiny: the small model that comes with nft-hub, and its settings: the preset `tiny`.
    out: the folder of the results, with which an interrupted evaluation goes on; None keeps no files.
    settings: further ones by name, such as `eval_images=4`, `eval_steps=40`, `seed=1` or `device="cuda"`.
    Raises UsageError and NftError, with a sentence that says what is wrong.
    """
    refuse_single_prompt(prompts, "prompts")
    host = host or load_host()
    given = [models] if isinstance(models, str | os.PathLike | Model) else list(models)
    chosen = [m if isinstance(m, Model) else parse_model(os.fspath(m), host) for m in given]
    # A mapping is the table of one reward, as run files have it, and no weights by name as for `compose`.
    one = isinstance(rewards, str | Mapping | RewardSpec | Composed) or callable(rewards)
    listed = cast(Iterable[Given], [rewards] if one else rewards)
    specs: list[GivenReward] = [r if isinstance(r, Composed) else as_spec(r) for r in listed]
    scales = [guidance] if isinstance(guidance, int | float) else guidance
    with ExitStack() as stack:
        request = make_request(
            *(host, chosen, specs, choose_preset(tiny, preset), settings),
            prompts=prompts,
            guidance=scales,
            negative_prompt=negative_prompt,
            protocol=os.fspath(protocol) if protocol is not None else None,
        )
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nft-eval-"))) / "evaluation"
        # Before rewards are loaded, which may take minutes; once more when all of the protocol is known.
        check_folder(Path(out), request)
        return run_evaluation(request, host, Path(out), save_images=save_images, tell=tell, show=show)


def make_request(
    host: Host,
    models: Sequence[Model],
    rewards: Sequence[GivenReward],
    preset: str | None,
    settings: Mapping[str, Any],
    *,
    prompts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | Prompt] | None = None,
    guidance: Sequence[float] | None = None,
    negative_prompt: str = "",
    protocol: str | None = None,
) -> Request:
    """Check an evaluation that is asked for, with nothing heavy loaded. Raises UsageError and NftError.

    rewards: empty where `settings` or the protocol name them. guidance: None is that of the first model's run.
    """
    check_names(settings)
    if isinstance(prompts, str | os.PathLike):
        settings, prompts = {**settings, "eval_prompts": os.fspath(prompts)}, None
    owns = read_all_own(models, host, settings)
    own = owns[0] if owns else None
    s = make_run_settings(host, preset, {"eval_images": IMAGES}, own.for_evaluation() if own else {}, settings)
    if protocol is not None:
        options = {"guidance": guidance is not None, "negative_prompt": bool(negative_prompt)}
        options |= {"rewards": bool(rewards), "prompts": prompts is not None}
        refuse_changes(protocol, [*(n for n, given in options.items() if given), *settings])
        known, texts = read_protocol(find_protocol(protocol))
        # What the protocol leaves out was left out when it was written.
        s = known.apply(s).model_copy(update={"unscorable": "error"})
        specs = rewards or parse_rewards(s, host)
        return prepare_request(s, host, models or default_models(s, preset), specs, texts, protocol=known)
    if not rewards:
        require_rewards(s, own)
    specs = rewards or parse_rewards(s, host)
    # What a run held out is no default for who gives prompts, and need not even be read.
    by_hand = prompts is not None or "eval_prompts" in settings
    given = {*settings, *(["prompts"] if by_hand else []), *(["guidance"] if guidance else [])}
    notes = describe_own(owns, given)
    if prompts is not None:
        texts = [p if isinstance(p, Prompt) else make_prompt(p, f"prompt {i}") for i, p in enumerate(prompts)]
        if not texts:
            raise UsageError("There are no prompts to evaluate on: the list of prompts is empty.")
    else:
        texts = read_held_out_of_run(own, host) if own and not by_hand else read_held_out(s)
    scales = guidance or [own.guidance if own else 1.0]
    return prepare_request(
        s,
        host,
        models or default_models(s, preset),
        specs,
        texts,
        scales,
        negative_prompt,
        notes=notes,
        defaults=name_defaults(own, preset),
    )


def default_models(settings: Settings, preset: str | None) -> list[Model]:
    """Take the preset's model where none is given. Raises UsageError without a preset."""
    if preset is None:
        raise UsageError(
            "There is no model to evaluate: give a hub id, a pipeline's folder, a run or a checkpoint, or "
            "--tiny for the small model that comes with nft-hub."
        )
    return [Model(settings.model, getattr(settings, "lora", ""), preset)]


def check_names(settings: Mapping[str, Any]) -> None:
    """Raise UsageError for a setting that an evaluation does not read."""
    for name in settings:
        if name in Settings.model_fields and name not in OF_PROTOCOL + FREE:
            raise UsageError(
                f"The setting {name} is not read by an evaluation, which reads {', '.join(OF_PROTOCOL + FREE)}."
            )


def refuse_changes(protocol: str, given: Iterable[str]) -> None:
    """Raise UsageError for options that a protocol fixes."""
    changed = [name for name in given if name not in FREE]
    if changed:
        raise UsageError(
            f"The protocol {protocol} says what {', '.join(changed)} is: leave that out, or leave the protocol "
            "out and begin an evaluation of its own."
        )
