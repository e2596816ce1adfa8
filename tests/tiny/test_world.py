"""The embedded world: its scenes, its detector and its committed files."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nft_tiny import captions, plugin
from nft_tiny.detector import detect_shapes
from nft_tiny.scenes import RELATIONS, draw_word, render_scene

DATA = plugin.DATA


def test_renders_are_reproducible():
    for caption in list(captions.make_scene_captions())[::37]:
        one, two, other = (render_scene(caption, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert one.shape == (32, 32, 3)
        assert (one == two).all()
        assert (one != other).any()


@pytest.mark.parametrize("relation", RELATIONS)
def test_objects_stand_clearly_in_their_relation(relation):
    metadata = {
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": [relation, 0]}]
    }
    for seed in range(20):
        found = detect_shapes(render_scene(metadata, np.random.default_rng(seed)))
        middles = {f.label: np.array([f.box[0] + f.box[2], f.box[1] + f.box[3]]) / 2 for f in found}
        x, y = middles["circle"] - middles["square"]
        along, across = {"left of": (-x, y), "right of": (x, y), "above": (-y, x), "below": (y, x)}[relation]
        # As drawn at least 11 and at most 8 px; the detector's boxes are right to half a pixel.
        assert along > 10.5 and abs(across) < 8.5


def test_prompt_files_are_what_the_script_writes(tmp_path):
    captions.write_sets(tmp_path)
    for name in captions.SIZES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()


def test_sets_share_no_prompt_and_have_every_tag():
    sets = {
        name: [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        for name in captions.SIZES
    }
    prompts = {name: {c["prompt"] for c in chosen} for name, chosen in sets.items()}
    assert not prompts["train"] & prompts["eval"]
    assert not prompts["train"] & prompts["select"]
    assert not prompts["eval"] & prompts["select"]
    for chosen in sets.values():
        assert set(Counter(c["tag"] for c in chosen)) == {*captions.TAGS, "text"}
    held_out = set(captions.split_words()[1])
    assert {c["text"].lower() for c in sets["eval"] if "text" in c} <= held_out


def test_committed_files_are_small_and_no_pickles():
    files = [path for path in Path(plugin.__file__).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]


def test_pipeline_is_a_plain_sd3_pipeline():
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        DATA / "pipeline", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    images = pipeline(
        ["a red circle", 'the word "CAT"'],
        num_inference_steps=8,
        guidance_scale=0,
        height=32,
        width=32,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (2, 32, 32, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.05


def test_clip_ranks_words_and_colours():
    from nft_plugins import Batch
    from nft_rewards.clipscore import CLIPScore

    score = CLIPScore(str(DATA / "clip"))
    rng = np.random.default_rng(0)
    tags = [c for c in captions.make_sets()["eval"] if c["tag"] in ("text", "color_attr", "colors")]
    pictures = np.stack([render_scene(c, rng) for c in tags])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    prompts = [c["prompt"] for c in tags]

    def scores(prompts):
        return score(Batch(images, prompts, tags, torch.arange(len(tags)))).values

    right, wrong = scores(prompts), scores(prompts[1:] + prompts[:1])
    assert (right > wrong).float().mean() >= 0.95


def test_words_are_drawn_in_their_cells():
    differs = (draw_word("CAT") != draw_word("CAR")).any(-1).any(0)
    assert differs[21:].any()
    assert not differs[:21].any()


def test_every_letter_can_be_read_on_a_sign():
    pytest.importorskip("rapidocr")
    from nft_rewards.ocr_engines import make_engine

    engine = make_engine("rapidocr")
    for word in ("ABC", "DEF", "GHI", "JKL", "MNO", "PQR", "STU", "VWX", "YZA"):
        board = Image.fromarray(draw_word(word)).resize((128, 128), Image.Resampling.BICUBIC)
        assert engine(np.asarray(board)) == word


def test_held_out_words_are_read_after_the_autoencoder():
    """So it is not the decoder that keeps a run from reading every word."""
    pytest.importorskip("rapidocr")
    from diffusers import AutoencoderTiny

    from nft_rewards.ocr_engines import make_engine
    from nft_tiny.pretrain.data import scale_to_bytes, scale_to_model

    engine = make_engine("rapidocr")
    vae = AutoencoderTiny.from_pretrained(DATA / "pipeline" / "vae", torch_dtype=torch.float32).eval()
    words = [word.upper() for word in captions.split_words()[1][:8]]
    with torch.no_grad():
        latents = vae.encode(scale_to_model(np.stack([draw_word(word) for word in words]))).latents
        boards = scale_to_bytes(vae.decode(latents).sample)
    large = [Image.fromarray(board).resize((128, 128), Image.Resampling.BICUBIC) for board in boards]
    assert [engine(np.asarray(board)) for board in large] == words


def test_wrong_captions_are_as_many_as_asked_for_and_name_no_held_out_word():
    from nft_tiny.pretrain.data import make_letter_triples, spoil_prompts

    words, held_out = make_letter_triples(), captions.split_words()[1]
    assert not set(words) & set(held_out)
    signs = [captions.make_word_caption(word) for word in words[::9]]
    scenes = list(captions.make_scene_captions())
    right = [c["prompt"] for c in signs + scenes]
    assert spoil_prompts(signs + scenes, 0, 0, seed=0) == right
    prompts = spoil_prompts(signs + scenes, 0.4, 0.2, seed=0)
    made = [prompt.split('"')[1] for prompt in prompts[: len(signs)]]
    assert not {word.lower() for word in made} & set(held_out)
    kept = [
        a == b for word, sign in zip(made, signs, strict=True) for a, b in zip(word, sign["text"], strict=True)
    ]
    # A letter that is drawn anew is the same one in one case of 26.
    assert np.mean(kept) == pytest.approx(1 - 0.4 * 25 / 26, abs=0.03)
    same = [a == b for a, b in zip(prompts[len(signs) :], right[len(signs) :], strict=True)]
    assert np.mean(same) == pytest.approx(0.8, abs=0.05)
