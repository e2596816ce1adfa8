"""Pictures of evaluations: what is kept of them, and the grids that are drawn of that."""

import json

import pytest
import torch
from PIL import Image, ImageDraw, ImageStat
from safetensors.numpy import load_file, save_file

from nft_core.pages.thumbnails import SIDE, decode_image, encode_image
from nft_core.runs.observers import captions
from nft_core.runs.observers import pictures as kept
from nft_core.runs.observers.captions import load_font, wrap_text
from nft_core.runs.observers.pictures import (
    collect_pictures,
    find_first_pictures,
    read_pictures,
    save_pictures,
)
from nft_core.runs.observers.samples import (
    CELL,
    MARGIN,
    Sample,
    Samples,
    Score,
    choose_samples,
    draw_grid,
    draw_score,
    fit_to_cell,
    wrap_prompt,
)
from nft_plugins import Batch, Part, Run, Scores

from .records import evaluation, pictures


def test_pictures_are_the_same_prompts_before_and_after(run):
    samples = Samples()
    batch, scores = pictures(["a cat", "a dog", "a very long prompt " * 9])
    samples.nft_eval_finished(run, evaluation(0, 0.1), batch, scores)
    folder = run.folder / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["000000.safetensors", "epoch-0000.png"]

    after = Batch(torch.full_like(batch.images, 0.2), batch.prompts, batch.metadata, batch.groups)
    samples.nft_eval_finished(run, evaluation(2, 0.2), after, scores)
    assert sorted(p.name for p in folder.glob("*.png")) == [
        "before-after.png",
        "epoch-0000.png",
        "epoch-0002.png",
    ]

    pixels = Image.open(folder / "before-after.png").convert("RGB")
    count = {c: n for n, c in pixels.getcolors(pixels.width * pixels.height)}
    first_of_each = [round(float(batch.images[i, 0, 0, 0]) * 255) for i in (0, 2, 4)]
    assert {(g, g, g) for g in first_of_each} <= count.keys()  # before, and exact
    assert count[(51, 51, 51)] >= 3 * (CELL // 32 * 32) ** 2  # after


def test_what_is_kept_reads_back(run):
    batch, scores = pictures(["a cat", "a dog"], images=2)
    batch = Batch(
        batch.images, batch.prompts, [{"tag": "one"}, {}, {"tag": None}, {"tag": float("nan")}], batch.groups
    )
    now = collect_pictures(evaluation(4, 0.1), batch, scores)
    save_pictures(run.folder, now)
    found = read_pictures(run.folder, 4, {})
    assert found == now
    assert [(c.prompt, c.kind, c.number) for c in found.cards] == [
        *(("a cat", "one", 1), ("a cat", "", 2), ("a dog", "", 1), ("a dog", "", 2))
    ]
    assert found.frame.figures == {"cat": pytest.approx([0, 1 / 3, None, 1])}
    exact = [decode_image(data).getpixel((0, 0))[0] for data in found.frame.pictures]
    assert exact == batch.uint8[:, 0, 0, 0].tolist()
    assert read_pictures(run.folder, 4, {"prompts": "other"}) is None
    assert read_pictures(run.folder, 5, {}) is None


@pytest.mark.parametrize("harm", ["rubbish", "no note", "other note", "fewer pictures"])
def test_a_file_of_something_else_has_no_pictures(harm, run):
    save_pictures(run.folder, collect_pictures(evaluation(0, 0.1), *pictures(["a cat"])))
    path = run.folder / "samples" / "000000.safetensors"
    arrays = load_file(path)
    if harm == "rubbish":
        path.write_bytes(b"rubbish")
    elif harm == "no note":
        save_file(arrays, path)
    elif harm == "other note":
        save_file(arrays, path, {kept.NOTE: json.dumps({"of": {}, "cards": [1], "figures": [], "notes": 3})})
    else:
        note = {"of": {}, "cards": [["a", "", 1]] * 3, "figures": {}, "notes": {}, "details": []}
        save_file(arrays, path, {kept.NOTE: json.dumps(note)})
    assert read_pictures(run.folder, 0, {}) is None


def test_large_pictures_are_kept_small_and_larger_ones_are_not_read():
    assert max(decode_image(encode_image(Image.new("RGB", (512, 256)))).size) == SIDE
    assert decode_image(encode_image(Image.new("RGB", (100, 64)))).size == (100, 64)
    large = encode_image(Image.new("RGB", (128, 128))).replace((128).to_bytes(4), (SIDE + 1).to_bytes(4))
    with pytest.raises((ValueError, OSError)):
        decode_image(large)


def test_of_very_many_pictures_some_of_all_prompts_are_kept(run, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 6)
    found = collect_pictures(evaluation(0, 0.1), *pictures([f"prompt {n}" for n in range(10)], images=3))
    assert [card.number for card in found.cards] == [1] * 6
    numbers = [int(card.prompt.split()[1]) for card in found.cards]
    assert min(numbers) == 0 and max(numbers) >= 8 and numbers == sorted(set(numbers))


def test_every_line_has_its_place(monkeypatch):
    """No two texts touch, however many rewards there are and however long a prompt is."""
    boxes = []
    draw = ImageDraw.ImageDraw.text

    def note(pen, place, text, fill, font):
        if text:
            left, top, right, bottom = font.getbbox(text)
            boxes.append((place[0] + left, place[1] + top, place[0] + right, place[1] + bottom, text))
        draw(pen, place, text, fill, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    rewards = [f"reward_with_a_long_name_{n}" for n in range(5)]
    prompts = ["a cat", 'a sign that says "' + "OPEN ALL NIGHT " * 12 + '"', "圆" * 60]
    scores = [Score(f"{name} {-12.345:.3g}", -0.125) for name in rewards]
    rows = [[Sample(Image.new("RGB", (160, 160)), p, scores, n) for n, p in enumerate(prompts, 1)]] * 2
    sheet = draw_grid(rows, ["base model", "epoch 2"])
    assert len(boxes) > 2 * 3 * len(rewards) * 2
    for i, (left, top, right, bottom, text) in enumerate(boxes):
        assert left >= 0 and right <= sheet.width and bottom <= sheet.height, text
        for other in boxes[:i]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (text, other[4])
    drawn = "".join(text for *_, text in boxes).replace(" ", "")
    assert drawn.count("OPENALLNIGHT") == 2 * 12


@pytest.mark.parametrize(
    ("change", "lower", "better"),
    [(0.5, False, True), (-0.5, False, False), (-0.5, True, True), (0.5, True, False)],
)
def test_a_change_is_marked_for_better_or_worse(change, lower, better):
    sheet = Image.new("RGB", (CELL, 20), "white")
    draw_score(ImageDraw.Draw(sheet), 0, 0, Score("cat 0.25", change, lower))
    red, green, _ = ImageStat.Stat(sheet.crop((CELL - 40, 0, CELL, 20))).sum
    assert (green > red) == better


@pytest.fixture
def no_fonts(monkeypatch):
    """A system without fonts, as many containers are."""
    monkeypatch.setattr(captions, "list_system_fonts", list)
    captions._font_for.cache_clear()
    yield
    captions._font_for.cache_clear()


def test_a_caption_that_no_font_can_draw_says_where_the_prompt_is(run, no_fonts):
    prompts = ["a cat", "кот", "a cafe\u0301", "红色的\n圆圈", "ένας κύκλος"]
    batch, scores = pictures(prompts, images=1)
    _, chosen = choose_samples(run, evaluation(0, 0.1), batch, scores)
    assert [" ".join(wrap_prompt(s)) for s in chosen] == [
        *("a cat", "кот", "a café", "prompt 4: see the report", "ένας κύκλος")
    ]


@pytest.mark.parametrize("text", ["a café — 5 €", "красный круг", "a cafe\u0301", "\u200ba cat\u202e", "λ ▲▼"])
def test_captions_are_no_boxes(text, no_fonts):
    text = captions.clean_text(text)
    font = captions.find_font(text, 13)
    box = captions.draw_letter(font, captions.MISSING)
    assert all(captions.draw_letter(font, letter) != box for letter in text if letter != " ")
    assert max(font.getlength(line) for line in wrap_text(text * 9, font, CELL)) <= CELL


def test_words_without_spaces_are_wrapped_and_none_is_lost():
    font = load_font(13)
    lines = wrap_text("no " + "W" * 60 + " end", font, int(7.5 * font.getlength("W")))
    assert lines == ["no", *["W" * 7] * 8, "W" * 4, "end"] or lines[-1] == "W" * 4 + " end"
    assert "".join(lines).replace(" ", "") == "no" + "W" * 60 + "end"


def test_a_text_without_end_is_cut():
    lines = wrap_text("word " * 10**5, load_font(13), CELL)
    assert len(lines) == captions.MOST_LINES and lines[-1].endswith("…")


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (176, 20), (1024, 512), (3, 900)])
def test_any_size_fits_its_cell(size):
    image = fit_to_cell(Image.new("RGB", size))
    assert max(image.size) <= CELL
    assert min(image.size) >= 1
    assert draw_grid([[Sample(image, "a", [], 1)]], ["x"]).width == CELL + 2 * MARGIN


def test_pictures_of_other_prompts_are_not_put_beside_one_another(run):
    first, other = ({"evaluation": {"prompts": p, "rewards": {"cat": p}}} for p in "12")
    folder = run.folder / "samples"
    batch, scores = pictures(["a cat", "a dog"])
    Samples().nft_eval_finished(run, evaluation(0, 0.1) | first, batch, scores)
    resumed = Samples()
    resumed.nft_eval_finished(run, evaluation(1, 0.1) | other, batch, scores)
    assert not (folder / "before-after.png").exists()
    resumed.nft_eval_finished(run, evaluation(2, 0.1) | other, batch, scores)
    assert (folder / "before-after.png").exists()
    # One that has the first prompts again finds the first pictures, and other rewards change no picture.
    for prompts, epoch in (("1", 0), ("2", 1)):
        now = collect_pictures(evaluation(3, 0.1) | {"evaluation": {"prompts": prompts}}, batch, scores)
        assert find_first_pictures(run.folder, now).epoch == epoch
    assert find_first_pictures(run.folder, now._replace(of={"prompts": "3"})) is None


def test_a_run_that_goes_on_compares_with_where_it_began(run):
    """The picture of the second process is that of a single one."""
    again = Run(run.folder, run.settings, epochs=2, epoch=1)
    first, last = pictures(["a cat", 'a "dog" at noon']), pictures(["a cat", 'a "dog" at noon'], size=40)
    samples = Samples()
    samples.nft_eval_finished(run, evaluation(0, 0.25), *first)
    samples.nft_eval_finished(run, evaluation(1, 0.5), *last)
    expected = (run.folder / "samples" / "before-after.png").read_bytes()
    (run.folder / "samples" / "before-after.png").unlink()
    Samples().nft_eval_finished(again, evaluation(1, 0.5), *last)
    assert (run.folder / "samples" / "before-after.png").read_bytes() == expected


def test_words_about_pictures_are_kept(run):
    batch, scores = pictures(["a cat"], images=1)
    told = Scores(scores.values, scores.valid, {}, {"cat": Part(1.0, scores)}, {"cat/read": ["<b>MEOW"]})
    save_pictures(run.folder, collect_pictures(evaluation(0, 0.1), batch, told))
    assert read_pictures(run.folder, 0, {}).frame.notes == {"cat/read": ["<b>MEOW"]}
