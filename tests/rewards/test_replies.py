"""A judge's replies in the forms that models write, and the number that each means."""

import time

import pytest

from nft_rewards.chat import Failed
from nft_rewards.replies import Answer, find_final_score, read_last_number


def read(text, **choice):
    return read_last_number({"message": {"content": text}, **choice}, find_final_score, 1, 5)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Final Score: 4",
            "Final Score:4.",
            "final score: 4",
            "FINAL SCORE = 4",
            "Final score is 4",
            "FinalScore=4",
        ),
        *(
            "**Final Score:** 4",
            "Final Score: **4**",
            "**Final** **Score**: 4",
            "__Final Score__: `4`",
            "Final Score: 4*",
        ),
        *(
            "Final Score： 4",
            "Final Score: ４",
            "Final Score: 4分",
            "### Final Score\n4",
            "Final Score:\n\n**4**",
        ),
        *(
            r"Final Score: \boxed{4}",
            r"Final Score: $\boxed{\text{4}}$",
            r"Final Score: \(4\)",
            "Final Score: [4]",
        ),
        *('{"Final Score": 4}', "{'final_score': '4'}", "| Final Score | 4 |", "<b>Final Score:</b> <b>4</b>"),
        *("Final Score: 4/5", "Final Score: **4** / 5.0", "Final Score: 4 (out of 5)", "Final Score: 4 of 5"),
        *("Final Score (1-5): 4", "Final Score - 4", "I give a final score of 4 for it", "Final Score: 4e0"),
        *(
            "Final Score: 4, 5 would be flawless",
            "Final Score: 4. 5 is for more",
            "Final Score: 4\n- 3 objects",
        ),
        *(
            "Final Score: 4 - good",
            "Final Score: 4\nThe final score reflects it.",
            "Final Score: 4, as 'Final Score:'.",
        ),
        *("Final Score: 2? No.\nFinal Score: 4", "From 'Final Score: 1' to 'Final Score: 5'.\nFinal Score: 4"),
        *("<think>Final Score: 2</think>\nFinal Score: 4", "Final Score: 2 </think> Final Score: 4"),
        *("◁think▷Final Score: 2◁/think▷Final Score: 4", "[THINK]Final Score: 2[/THINK]Final Score: 4"),
        *("<seed:think>2</seed:think>Final Score: 4", "Final Score: 4 <think>Final Score: 2"),
        *(
            "<final_score>4</final_score>",
            "Final Score [1-5]: 4",
            "Final Score out of 5: 4",
            "**Final Score** 4",
        ),
        *(
            "Final Score is: 4",
            "Final\u00a0Score\u200b: 4",
            "Final Score for this image: 4",
            "Final Score: 【4】",
        ),
        *(
            "Final Score: (3 + 5) / 2 = **4**",
            "Final Score: 0.5*3 + 0.5*5 ≈ 4.0",
            "Final Score: 4 of the 5 points",
        ),
        *(
            "Final Score: ４．０／５",
            "Final Score: 4 (3 of 4 objects)",
            "Final Score: 4 = good",
            "Final Score: *4* (good)",
        ),
        [
            {"type": "thinking", "thinking": []},
            {"type": "text", "text": "Final "},
            {"type": "text", "text": "Score: 4"},
        ],
    ],
)
def test_four(text):
    assert read(text) == Answer(0.8, 4.0)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Final Score: 3-4",
            "Final Score: 3–4",
            "Final Score: **3** to **4**",
            "Final Score: 3 or 4",
            "Final Score: 3~4",
        ),
        *(
            "Final Score: between 3 and 4",
            "Final Score: 4,5",
            "Final Score: 3..4",
            "Final score is 3-4",
            "Final Score: 3 and 4",
        ),
        *(
            "Final Score: 45",
            "Final Score: 5.9",
            "Final Score: -1",
            "Final Score: .5",
            "Final Score: 4e1",
            "Final Score: 4%",
        ),
        *(
            "Final Score: four",
            "Final Score: N/A",
            "Final Score: 4th",
            "Final Score: 4/10",
            "Final Score: 4 out of 10",
        ),
        *(
            "Final Score (1-10): 4",
            "Final Score out of 10: 4",
            "Final Score: 4 points out of 10",
            "Final Score: 4／10",
        ),
        *(
            "Final Score: 4 on a scale of 1 to 10",
            "Final Score: 4 (0-10)",
            "Final Score: 4 (of a maximum of 10)",
        ),
        *(
            "Final Score: 3 + 1",
            "Final Score: 4½",
            "Final Score: 4 1/2",
            "Final Score: 3 → 4",
            "Final Score: 3 -> 4",
        ),
        *("Final Score: 3至4", "Final Score: 3或4", "Final Score: 3, or 4", "Final Score: (4+4)/2"),
        *("Final Score: 2\nNo. Final Score: N/A", "Final Score: 4\nNo. Final Score: 3-4", "4", "", " "),
        *("Final Score\n1. Alignment: 4\n2. Quality: 5", "Final Score:\n- Alignment: 4"),
        *("<think>Final Score: 4", "<think>Final Score: 4</think>", "Final Score: 4</think> I cannot say."),
    ],
)
def test_no_score(text):
    with pytest.raises(Failed):
        read(text)


def test_what_is_wrong_is_said():
    for text, cause in (
        ("Final Score: 4/10", "not out of 5"),
        ("Final Score: 9", "not from 1 to 5"),
        ("<think>so", "no number in the reply, cut at max_tokens"),
    ):
        with pytest.raises(Failed, match=cause):
            read(text, finish_reason="length")


def test_odd_replies_take_no_time():
    texts = (
        "final score" + " " * 10**6,
        "final score " * 50_000,
        "final score" + r"\(" * 10**5,
        "final score:" + "<b>" * 10**5,
    )
    start = time.process_time()
    for text in texts:
        find_final_score(text)
    assert time.process_time() - start < 30  # Hours, where a pattern tries all ways to cut the text.
