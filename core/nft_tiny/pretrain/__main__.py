"""Makes the embedded world's weights, step by step: `prompts`, `vae`, `flow`, `clip`, `export`, `curves`.

`vae`, `flow` and `clip` train. They write to --out and append their figures to `training.jsonl` there. `flow`
may be run by torchrun.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
import torch.distributed as dist

from ..captions import write_sets

#: Pictures that are rendered for each training.
PICTURES = 40_000


def make_logger(out: Path, what: str, **constant: Any) -> Callable[..., None]:
    """Make a function that prints figures and appends them to `training.jsonl` in a folder, which is made.

    what: the thing that is trained. constant: figures of each line. The seconds so far are added.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = perf_counter()

    def log(**figures: Any) -> None:
        record = {"what": what, **constant, "seconds": round(perf_counter() - start, 1), **figures}
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        click.echo(line)
        with (out / "training.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


def add_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all trainings have: --out, --seed and --threads."""
    out = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
    seed = click.option("--seed", default=0, show_default=True)
    threads = click.option("--threads", default=os.cpu_count(), show_default=True)
    return out(seed(threads(command)))


@click.group()
def main() -> None:
    """Make the embedded world's weights."""


@main.command("prompts")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def write_prompts(out: Path) -> None:
    """Write the prompt files."""
    write_sets(out)


@main.command("vae")
@click.option("--steps", default=1500, show_default=True)
@click.option("--lr", default=4e-3, show_default=True)
@click.option(
    "--init",
    type=click.Path(path_type=Path, exists=True),
    help="A trained autoencoder. Its encoder, and so the latents, stay as they are; its decoder is trained.",
)
@add_options
def train_autoencoder(steps: int, lr: float, init: Path | None, out: Path, seed: int, threads: int) -> None:
    """Train the autoencoder."""
    from .data import make_dataset
    from .vae import train_vae

    torch.set_num_threads(threads)
    pictures, _ = make_dataset(PICTURES, seed)
    log = make_logger(out, "vae", seed=seed)
    vae = train_vae(pictures, init=init, steps=steps, seed=seed, batch=64, lr=lr, log=log)
    vae.save_pretrained(out / "vae")


@main.command("flow")
@click.option("--steps", default=10_000, show_default=True)
@click.option("--batch", default=96, show_default=True, help="Pictures a step, of all processes.")
@click.option("--lr", default=1.5e-3, show_default=True)
@click.option("--text-share", default=0.25, show_default=True, help="Share of pictures that show a word.")
@click.option(
    "--wrong-letters", default=0.4, show_default=True, help="Share of wrong letters in signs' captions."
)
@click.option("--wrong-scenes", default=0.0, show_default=True, help="Share of wrong captions of scenes.")
@click.option("--snapshot-every", default=1000, show_default=True, help="Steps.")
@click.option("--init", type=click.Path(path_type=Path), help="A snapshot to go on from; take another seed.")
@add_options
def train_base_model(
    steps: int,
    batch: int,
    lr: float,
    text_share: float,
    wrong_letters: float,
    wrong_scenes: float,
    snapshot_every: int,
    init: Path | None,
    out: Path,
    seed: int,
    threads: int,
) -> None:
    """Train the base model on --out/vae, and write its snapshots to --out/snapshots."""
    from diffusers import AutoencoderTiny

    from .data import make_dataset, spoil_prompts
    from .evaluate import evaluate_pipeline
    from .flow import load_pipeline, make_pipeline, train_flow
    from .vae import encode_latents

    torch.set_num_threads(threads)
    # torchrun sets WORLD_SIZE.
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    autoencoder = AutoencoderTiny.from_pretrained(out / "vae").eval()
    pipeline = load_pipeline(init) if init else make_pipeline(autoencoder)
    pipeline.register_modules(vae=autoencoder)
    pictures, captions = make_dataset(PICTURES, seed)
    log = make_logger(out, "flow", seed=seed, processes=dist.get_world_size() if dist.is_initialized() else 1)

    def save_snapshot(step: int, **figures: Any) -> None:
        log(step=step, **figures, **evaluate_pipeline(pipeline, images=6, seed=seed))
        pipeline.save_pretrained(out / "snapshots" / f"seed{seed}-{step:06d}")

    train_flow(
        pipeline,
        encode_latents(autoencoder, pictures),
        spoil_prompts(captions, wrong_letters, wrong_scenes, seed),
        steps=steps,
        seed=seed,
        batch=batch // (dist.get_world_size() if dist.is_initialized() else 1),
        lr=lr,
        text_share=text_share,
        snapshot_every=snapshot_every,
        snapshot=save_snapshot,
        log=log,
    )


@main.command("clip")
@click.option("--steps", default=3000, show_default=True)
@click.option("--lr", default=1.5e-3, show_default=True)
@click.option("--init", type=click.Path(path_type=Path, exists=True), help="A trained CLIP to go on from.")
@add_options
def train_world_clip(steps: int, lr: float, init: Path | None, out: Path, seed: int, threads: int) -> None:
    """Train the world's CLIP."""
    from .clip import train_clip
    from .data import make_dataset

    torch.set_num_threads(threads)
    pictures, captions = make_dataset(PICTURES, seed)
    log = make_logger(out, "clip", seed=seed)
    model, processor = train_clip(pictures, captions, init=init, steps=steps, seed=seed, lr=lr, log=log)
    model.save_pretrained(out / "clip")
    processor.save_pretrained(out / "clip")


@main.command("export")
@click.argument("snapshot", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=24, show_default=True, help="Pictures of each prompt.")
@click.option("--set", "name", default="select", show_default=True, help="select, train or eval.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write it here in half precision.")
def export_snapshot(snapshot: Path, images: int, name: str, seed: int, out: Path | None) -> None:
    """Evaluate a snapshot, and make it the base model."""
    from .evaluate import evaluate_pipeline
    from .flow import load_pipeline

    pipeline = load_pipeline(snapshot)
    if out:
        pipeline.to(dtype=torch.float16)
        shutil.rmtree(out, ignore_errors=True)  # Files of an older snapshot must not stay beside the new ones.
        pipeline.save_pretrained(out)
        for path in out.rglob("*.json"):
            remove_paths(path)
        # Evaluated in float32, as it is used, but with the rounded weights.
        pipeline.to(dtype=torch.float32)
    click.echo(json.dumps(evaluate_pipeline(pipeline, images, seed, name)))


@main.command("curves")
@click.argument("figures", type=click.Path(path_type=Path, exists=True))
@click.argument("picture", type=click.Path(path_type=Path))
def draw_curves(figures: Path, picture: Path) -> None:
    """Draw the curves of a training.jsonl as an SVG picture."""
    from .curves import draw_picture

    lines = figures.read_text(encoding="utf-8").splitlines()
    picture.write_text(draw_picture([json.loads(line) for line in lines]), encoding="utf-8")


def remove_paths(path: Path) -> None:
    """Remove the lines of a config in which diffusers notes the folder that the weights were read from."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"_name_or_path"' not in line), encoding="utf-8")


if __name__ == "__main__":
    main()
