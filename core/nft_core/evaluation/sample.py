"""`sample`: images of prompts from any model in one call, which the command `nft sample` makes too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UsageError, name_arguments
from ..host.host import Host, load_host
from ..parallel.processes import barrier, gather_texts, process_group, rank, world_size
from ..prompts import Prompt, make_prompt, read_prompts, refuse_single_prompt
from ..quiet import silence_libraries
from ..runs.inputs import choose_preset, make_run_settings
from ..runs.setup import autocast_dtype, check_guidance, check_model, image_shape, pick_device
from ..sampling.draws import Draws
from ..seeds import reseed
from ..settings import Settings, for_evaluation, make_settings
from ..training.attention import attention_kernel
from ..training.lora import merge_adapters
from .entries import Entry, Model, parse_model
from .generation import Generation, prepare_generation
from .own import OF_IMAGES, choose_held_out, name_defaults, read_own
from .request import find_resolution, read_held_out
from .running import explain_memory_errors
from .sample_files import Picture, check_grid, claim_new_folder, draw_grid_of_folder, save_picture, write_record

if TYPE_CHECKING:
    from PIL.Image import Image

#: Settings that may be given by name.
READ = (*OF_IMAGES, "lora", "device", "processes", "cache", "join_timeout", "peer_timeout")


@dataclass(frozen=True)
class SampleRequest:
    """Images that can be generated.

    settings: solver, steps and size are those of these images. defaults: where those that the user did not
    give came from. notes: sentences for the user on that.
    """

    settings: Settings
    prompts: Sequence[Prompt]
    guidance: float
    negative_prompt: str
    device: torch.device
    grid: bool = False
    defaults: str = ""
    notes: Sequence[str] = ()


@name_arguments()
def sample(
    model: str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | Prompt] | None = None,
    *,
    lora: str | os.PathLike[str] = "",
    preset: str | None = None,
    tiny: bool = False,
    images: int | None = None,
    solver: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    resolution: int | None = None,
    out: str | os.PathLike[str] | None = None,
    grid: bool = False,
    host: Host | None = None,
    **settings: Any,
) -> list[Image]:
    """Generate images of prompts: `sample("runs/mine", ["a red circle"], seed=1)` returns PIL images.

    model: a hub id, a pipeline's folder, a run or a checkpoint, or a preset's name; None takes the preset's.
    prompts: texts, or mappings with `prompt` and metadata, or a file of them; None takes the held-out ones.
    tiny: the small model that comes with nft-hub, and its settings: the preset `tiny`.
    images: of each prompt; they stand side by side in the result.
    What is None is as in the evaluations of the run that trained the model, or else as in the preset, with one
    image of each prompt.
    out: a new folder, to which the images are written too, and a grid of them with `grid`.
    settings: further ones by name, such as `device="cuda"` or `rollout_batch=8`.
    Raises UsageError and NftError, with a sentence that says what is wrong.
    """
    if grid and out is None:
        raise UsageError("A grid is written to a folder: give `out` too.")
    refuse_single_prompt(prompts, "prompts")
    host = host or load_host()
    named = {"lora": os.fspath(lora) or None, "images": images, "solver": solver, "steps": steps, "seed": seed}
    named["resolution"] = resolution
    request = make_sample_request(
        *(host, os.fspath(model) if model is not None else None, choose_preset(tiny, preset)),
        {**settings, **{name: value for name, value in named.items() if value is not None}},
        prompts=prompts,
        guidance=guidance,
        negative_prompt=negative_prompt,
        grid=grid,
    )
    folder = Path(out) if out is not None else None
    if folder:
        claim_new_folder(folder)
    pictures = run_sampling(request, host, folder)
    return [p.image for p in sorted(pictures, key=lambda p: (p.prompt_number, p.number))]


def make_sample_request(
    host: Host,
    model: str | None,
    preset: str | None,
    given: Mapping[str, Any],
    *,
    prompts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | Prompt] | None,
    guidance: float | None = None,
    negative_prompt: str = "",
    grid: bool = False,
) -> SampleRequest:
    """Check what is asked for, with no weights read. Raises UsageError and NftError.

    given: settings by name, and `images` and `steps`. prompts: None takes the held-out ones.
    """
    silence_libraries("diffusers", "transformers")
    if model is None and preset is None:
        raise UsageError(
            "There is no model to generate images with: give --model, a hub id, a pipeline's folder, a run or "
            "a checkpoint, or --tiny for the small model that comes with nft-hub."
        )
    settings = name_settings(host, model, given)
    own = read_own(Model(settings.get("model", ""), settings.get("lora", "")), host, settings)
    s = make_run_settings(host, preset, {"eval_images": 1}, own.of_images if own else {}, settings)
    guidance = s.eval_guidance if guidance is None else float(guidance)
    # `steps` holds those of evaluations from here on; a second number beside it could only contradict it.
    s = for_evaluation(s).model_copy(update={"eval_steps": 0})
    if prompts is not None:
        texts = read_given_prompts(prompts)
        if grid:
            check_grid(len(texts) * s.eval_images)
    device = pick_device(s.device)
    host.make_solver(s.solver, s.solver_options)
    if negative_prompt and guidance == 1:
        raise UsageError("A negative prompt counts under guidance alone: give --guidance too, such as 4.5.")
    check_model(s, host)
    check_guidance(s, host, guidance)
    find_resolution(s, host, [Entry("the model", s.model, s.lora, guidance)])
    if prompts is None:  # Last: which of them a run left out, its rewards may have to tell.
        held_out = make_settings(s.model_dump(), own.of_prompts) if own else s
        texts = choose_held_out(held_out, host) if own else read_held_out(s)
        if grid:
            check_grid(len(texts) * s.eval_images)
    defaults = name_defaults(own, preset)
    notes = [f"What is not given is as {defaults}."] if own else []
    return SampleRequest(s, texts, guidance, negative_prompt, device, grid, defaults, notes)


def name_settings(host: Host, model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings that options stand for. Raises UsageError for one that images do not depend on."""
    renamed = {"images": "eval_images", "steps": "eval_steps"}
    settings = {renamed.get(name, name): value for name, value in given.items()}
    for name in settings:
        if name in Settings.model_fields and name not in READ:
            raise UsageError(f"The setting {name} is not read here; these are: {', '.join(READ)}.")
    # A run may evaluate with another solver or size than it trains with, and the user's replaces both.
    if "solver" in settings:
        settings |= {"eval_solver": "", "solver_options": settings.get("solver_options", {})}
    if "resolution" in settings:
        settings["eval_resolution"] = 0
    if model is not None:
        parsed = parse_model(model, host)
        settings["model"] = parsed.model
        if parsed.lora:
            settings.setdefault("lora", parsed.lora)
    return settings


def read_given_prompts(
    prompts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | Prompt],
) -> list[Prompt]:
    """Read the prompts that are given. Raises UsageError where there are none, or one is not a prompt."""
    if isinstance(prompts, str | os.PathLike):
        return read_prompts(Path(prompts))
    texts = [p if isinstance(p, Prompt) else make_prompt(p, f"prompt {i}") for i, p in enumerate(prompts, 1)]
    if not texts:
        raise UsageError("There are no prompts to generate images of: the list of prompts is empty.")
    return texts


def run_sampling(
    request: SampleRequest,
    host: Host,
    folder: Path | None,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Picture]:
    """Generate this process's share of the images, and write all to a folder where one is given.

    folder: new or empty, and the first process's counts.
    """
    s = request.settings
    with ExitStack() as stack:
        for warning in stack.enter_context(process_group(request.device, s.peer_timeout, s.join_timeout)):
            tell(warning)
        stack.enter_context(explain_memory_errors())
        stack.enter_context(attention_kernel(s.attention))
        if folder:
            folder = Path(gather_texts(str(folder), request.device)[0])
        draws = Draws(request.prompts, range(len(request.prompts)), s.eval_images, s.seed, "eval", 0)
        if len(draws) < world_size():
            raise UsageError(f"{len(draws)} images cannot be shared by {world_size()} processes: use fewer.")
        generation = load_generation(request, host)
        # For plug-ins that draw from global generators against their contract.
        reseed(s.seed, "eval", 0, rank())
        for rows, batch in generation.generate(draws, request.guidance):
            for n, image in zip(rows.tolist(), batch.pil, strict=True):
                picture = Picture(image, request.prompts[n // draws.images], *divmod(n, draws.images))
                if folder:
                    save_picture(folder, picture)
                yield picture
        barrier()  # The record, and the grid, are of all processes' pictures.
        if folder and rank() == 0:
            height, width, _ = image_shape(generation.settings, generation.model)
            write_record(folder, describe_request(request, height, width))
            if request.grid:
                draw_grid_of_folder(folder, draws, s.model)


def load_generation(request: SampleRequest, host: Host) -> Generation:
    """Load the model and encode the prompts; a LoRA is added to the weights where an evaluation does so."""
    s = request.settings
    generation = prepare_generation(
        *(s, host, request.device, request.prompts),
        guided=request.guidance != 1,
        negative_prompt=request.negative_prompt,
    )
    in_floats = s.merge_lora == "auto" and not autocast_dtype(s, request.device)
    if s.merge_lora == "always" or in_floats:
        merge_adapters(generation.model.transformer)
    return generation


def describe_request(request: SampleRequest, height: int, width: int) -> dict[str, Any]:
    """Describe all that the images depend on, for `sample.json`."""
    s = request.settings
    names = ("model", "lora", "seed", "solver", "solver_options", "steps", "precision", "decode_precision")
    more = ("max_sequence_length", "family", "model_options", "rollout_batch", "decode_batch", "attention")
    return {
        **{name: getattr(s, name) for name in names},
        "images": s.eval_images,
        "guidance": request.guidance,
        "negative_prompt": request.negative_prompt,
        "height": height,
        "width": width,
        **{name: getattr(s, name) for name in more},
        "device": str(request.device),
        "processes": world_size(),
        "defaults": request.defaults,
        "prompts": [{"prompt": p.text, **p.metadata} for p in request.prompts],
    }
