"""Colours of objects: cut-outs by hand, a CLIP whose answer is known, and a small CLIP against PIL."""

import numpy as np
import pytest
import torch
from PIL import Image

from nft_rewards.clip import CLIP, Towers, load_clip
from nft_rewards.colours import COLORS, ColorClassifier, cut_out_object
from nft_rewards.pixels import normalise_pixels

PALETTE = {
    "red": (230, 20, 20),
    "orange": (255, 140, 0),
    "yellow": (250, 240, 20),
    "green": (20, 170, 40),
    "blue": (20, 40, 220),
    "purple": (130, 20, 170),
    "pink": (255, 130, 190),
    "brown": (120, 70, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
}


def test_cut_out_by_hand():
    image = torch.arange(4 * 5 * 3, dtype=torch.uint8).view(4, 5, 3)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = mask[2, 3] = True
    crop = cut_out_object(image, mask, (2.0, 1.0, 4.0, 3.0))
    grey = [153, 153, 153]  # 0x99
    assert crop.permute(1, 2, 0).tolist() == [[[21, 22, 23], grey], [grey, [39, 40, 41]]]
    assert crop.dtype == torch.uint8


def test_cut_out_is_pils_composite():
    rng = np.random.default_rng(0)
    pixels, inside = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), rng.random((40, 50)) > 0.5
    box = (7.0, 3.0, 31.0, 40.0)
    blank = Image.new("RGB", (50, 40), "#999")
    expected = Image.composite(Image.fromarray(pixels), blank, Image.fromarray(inside)).crop(box)
    ours = cut_out_object(torch.from_numpy(pixels), torch.from_numpy(inside), box)
    assert (ours.permute(1, 2, 0).numpy() == np.asarray(expected)).all()


class Fake:
    """A CLIP of ten dimensions, one a colour: pixels lie along their nearest colour of the palette, and a
    sentence along the colour that it names, if it names the label that belongs to it."""

    def __init__(self, skewed=()):
        self.images, self.texts, self.skewed = [], [], dict(skewed)
        towers = Towers(
            encode_images=self.encode_images,
            encode_texts=self.encode_texts,
            tokenize=self.tokenize,
            count_tokens=lambda texts: [1] * len(texts),
            length=77,
            width=10,
            logit_scale=100.0,
            device=torch.device("cpu"),
            dtype=torch.float32,
            size=8,
            crop=(8, 8),
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
        self.clip = CLIP("fake", towers)

    def encode_images(self, x):
        self.images.append(len(x))
        middle = x[:, :, 3:5, 3:5].mean((2, 3)) * 255
        palette = torch.tensor(list(PALETTE.values())).float()
        return -torch.cdist(middle, palette) + 400

    def tokenize(self, texts):
        self.texts += texts
        return torch.tensor([[i] for i in range(len(self.texts) - len(texts), len(self.texts))])

    def encode_texts(self, tokens):
        rows = []
        for (i,) in tokens.tolist():
            text = self.skewed.get(self.texts[i], self.texts[i])
            named = [c for c in COLORS if f" {c} " in text.replace("-colored", " ")]
            rows.append(torch.eye(10)[COLORS.index(named[0])])
        return torch.stack(rows)


def squares(colors, sizes=((8, 8),)):
    return [
        torch.tensor(PALETTE[c], dtype=torch.uint8).view(3, 1, 1).expand(3, *sizes[i % len(sizes)])
        for i, c in enumerate(colors)
    ]


def test_the_ten_colours_in_one_pass():
    fake = Fake()
    classify = ColorClassifier(fake.clip)
    colors = [*COLORS, *reversed(COLORS)]
    crops = squares(colors, sizes=((8, 8), (30, 9), (1, 40), (100, 100)))
    assert classify(crops, ["cat", "dog"] * 10) == colors
    assert fake.images == [20]
    # 10 colours x 2 sentences for each class, and 10 that name no class.
    assert len(fake.texts) == 50
    assert set(fake.texts) == {
        *(f"a photo of a {c} {k}" for c in COLORS for k in ("cat", "dog")),
        *(f"a photo of a {c}-colored {k}" for c in COLORS for k in ("cat", "dog")),
        *(f"a photo of a {c} object" for c in COLORS),
    }
    assert classify(squares(["red"]), ["cat"]) == ["red"]
    assert len(fake.texts) == 50
    assert classify([], []) == []


def test_a_colour_is_the_mean_of_its_sentences():
    # Two of the three sentences for a red cat lie along blue: to blue a red cat's vector is 2 / sqrt(5), and
    # to red a blue cat's is 0. A red crop goes to whichever colour's mean is nearest.
    skewed = {
        "a photo of a red cat": "a photo of a blue cat",
        "a photo of a red-colored cat": "a photo of a blue cat",
    }
    classify = ColorClassifier(Fake(skewed.items()).clip)
    classify.learn_colors(["cat", "dog"])
    red = classify.classifiers["cat"][0]
    assert red[0].item() == pytest.approx(1 / 5**0.5)
    assert red[4].item() == pytest.approx(2 / 5**0.5)
    assert classify.classifiers["dog"][0, 0].item() == pytest.approx(1)


def test_classifiers_belong_to_the_class():
    # For cats, the words red and blue are exchanged.
    swap = {"red": "blue", "blue": "red"}
    skewed = {
        t.format(c): t.format(swap[c])
        for t in ("a photo of a {} cat", "a photo of a {}-colored cat")
        for c in swap
    }
    classify = ColorClassifier(Fake(skewed.items()).clip)
    assert classify(squares(["red", "red", "blue"]), ["cat", "dog", "cat"]) == ["blue", "red", "red"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz-"
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=60)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(vocab), "max_position_embeddings": 60, "eos_token_id": 1}
    model = CLIPModel(
        CLIPConfig(
            text_config=text, vision_config=sizes | {"image_size": 48, "patch_size": 16}, projection_dim=16
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def crop_as_published(picture, side):
    """Crop as GenEval's evaluator does: by torchvision's CenterCrop, which rounds half a margin to even."""
    width, height = (int(side * n / min(picture.size)) for n in picture.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def test_a_crop_is_the_published_one():
    """Margins of 3 and 7 pixels: transformers begins at 1 and 3, torchvision and the evaluator at 2 and 4."""
    classify = ColorClassifier(Fake().clip)  # Its towers read 8 x 8 pixels.
    for margin, begins in ((3, 2), (7, 4), (5, 2), (4, 2)):
        seen = []
        classify.clip.encode_pixels = lambda x, seen=seen: seen.append(x) or torch.zeros(1, 10)
        image = torch.arange(8 + margin, dtype=torch.uint8).expand(3, 8, 8 + margin)
        classify.compute_cosines([image], ["cat"])
        assert seen[0][0, 0, 0].tolist() == list(range(begins, begins + 8))
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        assert (np.asarray(crop_as_published(picture, 8))[0, :, 0] == seen[0][0, 0, 0].numpy()).all()


def test_a_checkpoint_equals_one_crop_at_a_time_by_pil(checkpoint):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(checkpoint).eval()
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    shapes = rng.integers(20, 90, (40, 2)).tolist()
    pictures = [Image.fromarray(b).resize(s) for b, s in zip(blocks, shapes, strict=True)]
    labels = [("cat", "dog", "tv")[i % 3] for i in range(40)]

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def similarities(picture, label):
        with torch.no_grad():
            crop = torch.from_numpy(np.array(crop_as_published(picture, 48))).permute(2, 0, 1)
            pixels = normalise_pixels(crop[None])
            image = unit(model.get_image_features(pixel_values=pixels).pooler_output)
            rows = []
            for c in COLORS:
                sentences = [f"a photo of a {c} {label}", f"a photo of a {c}-colored {label}"]
                tokens = tokenizer(
                    [*sentences, f"a photo of a {c} object"], padding="max_length", return_tensors="pt"
                )
                texts = unit(model.get_text_features(input_ids=tokens.input_ids).pooler_output)
                rows.append(unit(texts.mean(0)))
        return torch.stack(rows) @ image[0]

    expected = torch.stack([similarities(p, k) for p, k in zip(pictures, labels, strict=True)])
    crops = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]
    classify = ColorClassifier(load_clip(checkpoint, "cpu"))
    torch.testing.assert_close(classify.compute_cosines(crops, labels), expected, rtol=0, atol=1e-3)
    best, second = expected.topk(2).values.T
    clear = (best - second) > 2e-4
    assert clear.sum() >= 35
    named = np.array([COLORS[i] for i in expected.argmax(1).tolist()])
    assert (np.array(classify(crops, labels)) == named)[clear.numpy()].all()
    assert len(set(named)) > 2
