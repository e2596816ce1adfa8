"""How a checkpoint is used in plain diffusers: code to copy, which makes an evaluation picture of the run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..models.pipeline import PipelineModel
from ..models.small_files import DIFFUSERS_FILE
from ..models.sources import ModelSource, find_source
from ..seeds import hash_key
from ..settings import for_evaluation
from ..training.state import Training
from .setup import image_shape

EULER = "FlowMatchEulerDiscreteScheduler"
#: The solver dpm2 as a scheduler of diffusers. Its formula is that of nft_solvers/dpm2.py.
DPM2 = '''class DPM2(FlowMatchEulerDiscreteScheduler):
    """DPM-Solver++ 2M in flow form, the solver that the model was trained with."""

    def step(self, v, t, x, **_):
        i = self.timesteps.tolist().index(float(t))
        x, (t, s), log_snr = x.float(), self.sigmas[i : i + 2], lambda t: -torch.logit(t)
        x_0 = d = x - t * v.float()
        if i and s:
            before, x_before = self.before
            d = x_0 + (log_snr(s) - log_snr(t)) / (2 * (log_snr(t) - log_snr(before))) * (x_0 - x_before)
        self.before = t, x_0
        return ((s / t * x + (1 - s / t) * d).to(v.dtype),)


'''
#: Solvers whose steps the code takes; with others its picture is only like the run's.
EXACT = ("euler", "dpm2")


def explain_use(training: Training, folder: Path) -> str:
    """Write what is told at the end of a run: how to use its newest checkpoint in plain diffusers.

    Empty for a model that is no pipeline of diffusers, where nothing was saved, and where diffusers cannot read
    what the run began from.
    """
    model, path = training.policy.model, folder / "checkpoints" / f"{training.at.step:06d}"
    if not isinstance(model, PipelineModel) or not path.is_dir():
        return ""
    try:
        code = write_use(training, model, find_source(str(path)))
    except UsageError:
        return ""
    solver = training.settings.solver
    picture = "the run's first evaluation picture"
    if solver not in EXACT:
        picture = f"a picture like {picture}, which the solver {solver} made"
    return f"To use it in plain diffusers (this makes {picture}):\n\n{code}"


def write_use(training: Training, model: PipelineModel, source: ModelSource) -> str:
    """Write the code that loads a model in plain diffusers and makes the run's first evaluation picture."""
    names, load = write_loading(training, model, source)
    scheduler, options = write_scheduler(training, model)
    names += [EULER] if scheduler else []
    solver = DPM2 if training.settings.solver == "dpm2" else ""
    head = f"import torch\nfrom diffusers import {', '.join(sorted(names))}\n\n{solver}"
    return head + "\n".join([*load, *scheduler, *write_call(training, model, options)])


def write_loading(training: Training, model: PipelineModel, source: ModelSource) -> tuple[list[str], list[str]]:
    """Write the lines that load a model; returns the classes that they need, and the lines.

    Raises UsageError for what diffusers does not load: LoRAs in some layouts, text encoders of single files.
    """
    dtype = f"dtype={training.policy.dtype if source.loras else 'torch.float32'}"
    classes, lines, given = [model.pipeline_class], [], [f"{name}=None" for name in list_absent(model)]
    if source.transformer:
        kind, place = type(model.transformer).__name__, write_text(str(source.transformer))
        classes.append(kind)
        given.append("transformer=transformer")
        if source.transformer.is_file():
            where = f'config={write_text(source.base)}, subfolder="transformer"'
            lines.append(f"transformer = {kind}.from_single_file({place}, {where}, {dtype})")
        else:
            lines.append(f"transformer = {kind}.from_pretrained({place}, {dtype})")
    if source.file and model.readers.keys() - {"vae"}:
        raise UsageError(
            f"{source.file} holds text encoders, which diffusers loads with whole pipelines alone."
        )
    if source.file and model.readers:
        kind, where = type(model.pipeline.vae).__name__, f'config={write_text(source.base)}, subfolder="vae"'
        classes.append(kind)
        given.append("vae=vae")
        lines.append(f"vae = {kind}.from_single_file({write_text(str(source.file))}, {where}, {dtype})")
    options = ", ".join([write_text(source.base), *given, dtype])
    device = '.to("cuda")' if training.policy.device.type == "cuda" else ""
    lines.append(f"pipeline = {model.pipeline_class}.from_pretrained({options}){device}")
    names = [f"lora{number}" for number in range(len(source.loras))]
    for name, lora in zip(names, source.loras, strict=True):
        if lora.file.name != DIFFUSERS_FILE:
            raise UsageError(f"{lora.file} is of a layout that load_lora_weights does not read.")
        named = f', adapter_name="{name}"' if len(names) > 1 else ""
        lines.append(f"pipeline.load_lora_weights({write_text(str(lora.file.parent))}{named})")
    return classes, lines + ([f"pipeline.set_adapters({json.dumps(names)})"] if len(names) > 1 else [])


def write_scheduler(training: Training, model: PipelineModel) -> tuple[list[str], list[str]]:
    """Write the line that sets another scheduler than the pipeline's, if any, and options that it asks for."""
    kind = "DPM2" if training.settings.solver == "dpm2" else EULER
    config = model.pipeline.scheduler.config
    if not config.get("use_flow_sigmas"):
        own = [f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config)"] if kind == "DPM2" else []
        return own, []
    # A multistep scheduler, which would take other times: here they are Euler's, with its shift.
    steps = for_evaluation(training.settings).steps
    times = f"sigmas=[1 - i / {steps} for i in range({steps})]"
    return [f"pipeline.scheduler = {kind}(shift={config.get('flow_shift', 1.0)})"], [times]


def write_call(training: Training, model: PipelineModel, more: list[str]) -> list[str]:
    """Write the lines that draw the noise and call the pipeline."""
    s = training.settings
    height, width, shape = image_shape(s, model)
    size = ", ".join(map(str, (1, *shape)))
    number = hash_key(s.seed, "eval", 0, 0, 0)  # As `training.evaluation` draws the first image.
    call: dict[str, Any] = {"num_inference_steps": for_evaluation(training.settings).steps, **model.unguided}
    call |= {"height": height, "width": width}
    if "max_sequence_length" in inspect.signature(model.pipeline.__call__).parameters:
        call["max_sequence_length"] = model.max_sequence_length
    options = ", ".join(["latents=noise", *(f"{name}={value!r}" for name, value in call.items()), *more])
    return [
        f"noise = torch.randn({size}, generator=torch.Generator().manual_seed({number}))",
        *(["noise = pipeline._pack_latents(noise, *noise.shape)"] if model.takes_tokens else []),
        f"prompt = {write_text(training.eval_prompts[0].text)}",
        f"image = pipeline(prompt=prompt, {options}).images[0]",
        'image.save("image.png")',
    ]


def list_absent(model: PipelineModel) -> list[str]:
    """List the parts that a pipeline lacks and that diffusers, without being told, takes to be forgotten."""
    optional: Any = type(model.pipeline)._optional_components
    return [n for n, kind in model.index.items() if kind == [None, None] and n not in optional]


def write_text(text: str) -> str:
    """Write a text as Python and any terminal can read it."""
    return json.dumps(text, ensure_ascii=not text.isprintable())
