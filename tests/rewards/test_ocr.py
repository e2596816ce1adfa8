"""OCR by the real engine, and the published formula by hand."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from nft_plugins import Batch, PromptError
from nft_rewards.ocr import OCR, match_texts
from nft_rewards.words import find_target_text, fold_text


def picture(text, size=40, ink="white", paper="black"):
    image = Image.new("RGB", (224, 96), paper)
    ImageDraw.Draw(image).text((12, 24), text, font=ImageFont.load_default(size), fill=ink)
    return np.asarray(image)


def batch_of(pictures, prompts, metadata=None):
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return Batch(images, prompts, metadata or [{}] * len(prompts), torch.arange(len(prompts)))


@pytest.fixture(scope="module")
def ocr():
    return OCR(workers=2)


def test_reads_rendered_words(ocr):
    words = ["HELLO", "OPEN", "Stop 42", "coffee"]
    scores = ocr(batch_of([picture(w) for w in words], [f'a sign that says "{w}"' for w in words]))
    assert scores.values.tolist() == [1.0] * 4
    assert scores.details["exact"].tolist() == [1.0] * 4
    assert scores.valid.all()


def test_ink_and_paper(ocr):
    colours = [("red", "blue"), ("black", "yellow"), ("navy", "white")]
    pictures = [picture("HELLO", ink=a, paper=b) for a, b in colours]
    assert ocr(batch_of(pictures, ['"HELLO"'] * 3)).values.tolist() == [1.0] * 3


def test_blank_and_wrong_words_score_what_they_show(ocr):
    scores = ocr(batch_of([picture(""), picture("STOP")], ['"HELLO"', '"SHOP"']))
    assert scores.valid.all()
    assert scores.values.tolist() == [0.0, 0.75]  # S[T -> H]OP: one letter of four
    assert scores.details["distance"].tolist() == [5.0, 1.0]


def test_small_images_are_enlarged():
    from nft_tiny.scenes import draw_word

    batch = batch_of([draw_word("CAT")], ['"CAT"'])
    assert OCR(workers=1, upscale=4)(batch).values.tolist() == [1.0]


def test_an_engine_that_fails_makes_the_sample_invalid(monkeypatch):
    reward = OCR(workers=1)
    engine = reward.engines.get()

    def breaks_on_blue(image):
        if image[0, 0, 0] > 200:  # BGR: the first channel is blue
            raise RuntimeError("out of memory")
        return engine(image)

    reward.engines.put(breaks_on_blue)
    pictures = [picture("HELLO", paper="blue"), picture("HELLO", paper="red")]
    scores = reward(batch_of(pictures, ['"HELLO"'] * 2))
    assert scores.valid.tolist() == [False, True]
    assert scores.values[1] == 1.0


@pytest.mark.parametrize(
    ("prompt", "metadata", "expected"),
    [
        ('a sign "OPEN"', {}, "OPEN"),
        ("a sign “OPEN”", {}, "OPEN"),
        ("a sign „OPEN“", {}, "OPEN"),
        ("a sign «OPEN»", {}, "OPEN"),
        ('"OPEN" above "LATE"', {}, "OPEN LATE"),
        ('a sign "OPEN 24"', {}, "OPEN 24"),
        ("„OPEN” ‹LATE› ›A‹ »B« ”C”", {}, "OPEN LATE A B C"),
        ("「開」と『店』と＂OPEN＂", {}, "開 店 OPEN"),
        ("「a『b』「c」」", {}, "a『b』「c」"),
        ('“he said "hi"” and «a „b“»', {}, 'he said "hi" a „b“'),
        ('"he said "hi" to me"', {}, 'he said "hi" to me'),
        ('"don\'t walk" “don’t walk”', {}, "don't walk"),  # alike, so they count once
        ('a sign "Keep it!". It says "KEEP IT!", "now"', {}, "Keep it! now"),
        ('the words "Hello," and then "hello" and "C", "C++"', {}, "Hello, C C++"),
        (r"says \"OPEN\"", {}, "OPEN"),
        ('a sign "OPEN"', {"text": None}, "OPEN"),
        ('a sign "OPEN"', {"text": float("nan")}, "OPEN"),
        ("", {"text": ["NO", "NO", "WAY"]}, "NO NO WAY"),
        ("", {"text": '["NO", "WAY"]'}, "NO WAY"),
        ("", {"text": "[EXIT]"}, "[EXIT]"),
        ('a sign "OPEN"', {"text": "SHUT"}, "SHUT"),
        ('a 12" pipe that says "CAT"', {"text": "CAT"}, "CAT"),
        ('a 12" pipe that says "CAT"', {}, "CAT"),
        ('a 6\'2" man, a 5"x7" card, a ½" bolt, a 12” TV and a "CAT" of 3"', {}, "CAT"),
        ('"Since 1998" and "24/7"', {}, "Since 1998 24/7"),
        ('the text ""GifCo"" and ""X""', {}, "GifCo X"),
        ('"A sign, red, that says ""OPEN"" now"', {}, "OPEN"),  # a line of CSV
        ("\"the dog's 'n' don't\" '90s", {}, "the dog's 'n' don't"),
        ("", {"text": ["A", None]}, "A"),
        ("", {"text": '["A", null]'}, "A"),
        ("no quotes", {"text": "SHUT"}, "SHUT"),
    ],
)
def test_targets(prompt, metadata, expected):
    assert find_target_text(prompt, metadata) == expected


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a cat", {}),
        ('a sign ""', {}),
        ('a sign " "', {}),
        ("'x'", {}),
        ('a sign of 5"CAT"', {}),
        ('"12" PIZZA"', {}),
        ('a "" sign "X"', {}),
        ("", {"text": [None]}),
        ('a 12" pipe and a 5" pipe', {}),
        ('"A"', {"text": ""}),
        ("", {"text": 3}),
        ("", {"text": []}),
        ("", {"text": ["A", ""]}),
        ("", {"text": ["A", 3]}),
        ('“A"', {}),
        ("A”", {}),
        ("5” pipe”", {}),
        ('"A and "B"', {}),
        ('"\u200b\u00ad"', {}),
    ],
)
def test_a_prompt_without_words_is_an_error(ocr, prompt, metadata):
    with pytest.raises(PromptError):
        ocr.check_prompt(prompt, metadata)
    with pytest.raises(PromptError):
        ocr(batch_of([picture("A")], [prompt], [metadata]))


def test_formula_by_hand():
    assert match_texts("abcd", "abcd") == (1.0, 0.0, 1.0)
    assert match_texts("abxd", "abcd") == (0.75, 1.0, 0.0)
    assert match_texts("xxabcdxx", "abcd") == (1.0, 0.0, 0.0)  # contained: full marks, as published
    assert match_texts("xxabcdxx", "abcd", contains=False) == (0.0, 4.0, 0.0)
    assert match_texts("xxabcdxx", "abcd", spam_penalty=0.5) == (0.5, 0.0, 0.0)  # 4 too many of 4, by half
    assert match_texts("zzzzzzzzzz", "ab") == (0.0, 2.0, 0.0)  # the distance stops at the length
    assert match_texts("", "ab") == (0.0, 2.0, 0.0)


def test_folding():
    assert fold_text(" He  LLo\n", True) == "hello"
    assert fold_text("O₂ it’s", True) == "o2it's"
    assert fold_text("don´t it｀s", True) == "don'tit's"
    assert fold_text("O₂", False) == "o₂"
    assert fold_text("A\u200bB\u00adC\ufeffD\u200eE\u2060F\x08G♥\ufe0f", True) == "abcdefg♥"
    assert fold_text("“x” «y» — – − ‐ 5′6″", True) == fold_text('"x" "y" - - - - 5\'6"', True)
    assert fold_text("1⁄2 ½ 〜 ΟΔΟΣ οδος", True) == "1/21/2~οδοσοδοσ"
    assert fold_text("a\u200bb", False) == "a\u200bb"


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("ПРИВЕТ", "П"),
        ("Hello мир", "м"),
        ("שלום", "ש"),
        ("سلام", "س"),
        ("สวัสดี", "ส"),
        ("안녕", "안"),
        ("OK 🦄", "🦄"),
    ],
)
def test_letters_that_the_recogniser_does_not_know_are_refused(ocr, text, unknown):
    for prompt, metadata in ((f'"{text}"', {}), ("p", {"text": text})):
        with pytest.raises(PromptError, match=f"the recogniser does not know '{unknown}'.*recogniser=PATH"):
            ocr.check_prompt(prompt, metadata)
    with pytest.raises(PromptError, match="does not know"):
        ocr(batch_of([picture("A")], [f'"{text}"']))


def test_letters_that_fold_to_known_ones_are_known(ocr):
    prompt = '"Cafe\u0301 Größe — ½ ﬁne ΟΔΟΣ ③ 日本 «x»"'
    assert ocr.read_target(prompt, {}) == 'cafégröße-1/2fineοδοσ3日本"x"'


def test_what_a_prompt_quotes_twice_is_written_once(ocr):
    prompt = 'a man with a sign that has text: "Keep it". The sign says "Keep it".'
    assert ocr(batch_of([picture("Keep it")], [prompt], [{"text": None}])).values.tolist() == [1.0]


def test_bad_options():
    with pytest.raises(ValueError, match="upscale"):
        OCR(upscale=0)


def test_an_image_with_nan_is_invalid(ocr):
    batch = batch_of([picture("HELLO")] * 2, ['"HELLO"'] * 2)
    batch.images[1, 0, 0, 0] = torch.nan
    assert ocr(batch).valid.tolist() == [True, False]
