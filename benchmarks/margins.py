"""Does a policy learn shapes, or what the detector takes for them? Strict accuracy by ever stricter detectors.

python benchmarks/margins.py RUN [CHECKPOINT]

Generates images of the held-out prompts of a finished `nft run --tiny --reward geneval` with the base model and
with the run's last checkpoint, and counts a shape only where its overlap with its own outline exceeds that with
every other kind's by a margin. Margin 0 is the reward's own detector. Were shapes learned that lie between two,
the share of them that keep a margin would fall.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from diffusers import SD3Transformer2DModel

from nft_core.host.host import load_host
from nft_core.runs.assembly import assemble_training
from nft_core.runs.folder import read_settings
from nft_core.runs.inputs import choose_prompts, load_rewards, prepare_inputs
from nft_core.runs.setup import load_model, pick_device
from nft_core.sampling.draws import Draws
from nft_core.sampling.rollout import roll_out
from nft_core.settings import make_settings
from nft_core.training.gallery import Gallery
from nft_tiny import detector
from nft_tiny.scenes import SHAPES

MARGINS = (0.0, 0.03, 0.06, 0.1)
#: Kind, colour and box.
Shape = tuple[str, str, detector.Box]


def measure_margin(pixels: np.ndarray, contrast: np.ndarray, background: np.ndarray, shape: Shape) -> float:
    """Return by how much a recognised shape's overlap exceeds that with the next kind."""
    label, color, box = shape
    ink = detector.PALETTE[detector.NAMES.index(color)] - background
    covered = ((pixels - background) @ ink / (ink @ ink)).clip(0, 1) * (contrast > 0)
    overlaps = {kind: detector.fit_box(covered, kind, box)[0] for kind in SHAPES}
    return overlaps.pop(label) - max(overlaps.values())


def make_stricter(
    margin: float, recognise: Callable[..., Shape | None] = detector.recognise_shape
) -> Callable[..., Shape | None]:
    """Return a `recognise_shape` that knows a shape only where it keeps the margin."""

    def by_margin(pixels: np.ndarray, contrast: np.ndarray, background: np.ndarray) -> Shape | None:
        shape = recognise(pixels, contrast, background)
        clear = shape is None or not margin or measure_margin(pixels, contrast, background, shape) >= margin
        return shape if clear else None

    return by_margin


def main() -> None:
    """Measure the checkpoints of the run that the command line names."""
    folder = Path(sys.argv[1])
    settings = make_settings(read_settings(folder), {"processes": 1, "device": "cpu"})
    host = load_host()
    inputs = prepare_inputs(settings, host)
    device = pick_device("cpu")
    reward = load_rewards(inputs.rewards, host, device, settings.reward_defaults)
    prompts, held_out = choose_prompts(inputs, reward.find_refusals, settings.unscorable, lambda text: None)
    model = load_model(settings, host, device)
    run = assemble_training(settings, model, reward, inputs.solver, prompts, held_out, device, folder)
    last = sys.argv[2] if len(sys.argv) > 2 else max((folder / "checkpoints").glob("[0-9]*"))
    trained = SD3Transformer2DModel.from_pretrained(last, subfolder="transformer").float().state_dict()
    print(f"| strict accuracy at margin | {' | '.join(map(str, MARGINS))} |\n|{'---|' * (len(MARGINS) + 1)}")
    for name, weights in (("base", None), (f"checkpoint {Path(last).name}", trained)):
        if weights:
            model.transformer.load_state_dict(weights)
        draws = Draws(held_out, range(len(held_out)), settings.eval_images, settings.seed, "eval", 0)
        gallery = Gallery(draws)  # Pictures of the embedded world are small: all are kept.
        rollout = roll_out(
            run.eval_sampler, draws, run.eval_condition, reward, run.progress, run.phase, look=gallery.add
        )
        batch, _ = gallery.collect(rollout.scores, device)
        row = []
        for margin in MARGINS:
            detector.recognise_shape = make_stricter(margin)
            row.append(float(reward(batch).details["geneval/strict"].mean()))
        detector.recognise_shape = make_stricter(0.0)
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} |", flush=True)


if __name__ == "__main__":
    main()
