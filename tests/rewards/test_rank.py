"""Ranks within groups, by hand; the reward that is ranked, by name."""

from itertools import pairwise

import pytest
import torch

from nft_core.errors import UsageError
from nft_core.host.host import Host, load_host
from nft_core.scoring.composer import Composed, Term, compose
from nft_plugins import Batch, PromptError, Scores
from nft_rewards.rank import Rank, rank_groups

NAN = float("nan")


def batch_of(groups):
    n = len(groups)
    return Batch(torch.zeros(n, 3, 2, 2), ["p"] * n, [{}] * n, torch.tensor(groups, dtype=torch.int64))


def inner(values, valid=None, **details):
    values = torch.tensor(values)
    valid = torch.ones(len(values), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return lambda batch: Scores(values, valid, {k: torch.tensor(v) for k, v in details.items()})


def rank(reward):
    return Rank("x", make_reward=lambda spec: reward)


@pytest.mark.parametrize(
    ("values", "valid", "groups", "expected"),
    [
        ([3.0, 1.0, 2.0], [1, 1, 1], [0, 0, 0], [1.0, 0.0, 0.5]),
        ([3.0, 1.0, 2.0, 9.0], [1, 1, 1, 1], [0, 7, 0, 7], [1.0, 0.0, 0.0, 1.0]),
        ([1.0, 1.0, 5.0, 1.0, 7.0], [1] * 5, [0] * 5, [0.25, 0.25, 0.75, 0.25, 1.0]),
        ([4.0, 4.0], [1, 1], [0, 0], [0.5, 0.5]),
        ([-8.0, 4.0], [1, 1], [0, 1], [0.5, 0.5]),
        ([1.0, 99.0, 2.0, 3.0], [1, 0, 1, 1], [0] * 4, [0.0, 0.5, 0.5, 1.0]),
        ([1.0, NAN], [1, 0], [0, 0], [0.5, 0.5]),
        ([], [], [], []),
    ],
)
def test_by_hand(values, valid, groups, expected):
    ranks = rank_groups(
        torch.tensor(values), torch.tensor(valid, dtype=torch.bool), torch.tensor(groups, dtype=torch.int64)
    )
    assert ranks.tolist() == expected


def test_equals_scipys_mean_ranks():
    from scipy.stats import rankdata

    values = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(0)).float()
    groups = torch.arange(60) % 3
    ranks = rank_groups(values, torch.ones(60, dtype=torch.bool), groups)
    for g in range(3):
        torch.testing.assert_close(
            ranks[groups == g], torch.tensor((rankdata(values[groups == g]) - 1) / 19).float()
        )


def test_invalid_samples_stay_so_and_do_not_count():
    scores = rank(inner([5.0, NAN, 1.0, 3.0], [True, False, True, True], exact=[1.0, 0.0, 0.0, 1.0]))(
        batch_of([0, 0, 0, 0])
    )
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.values[[0, 2, 3]].tolist() == [1.0, 0.0, 0.5]
    assert scores.details["value"][[0, 2, 3]].tolist() == [5.0, 1.0, 3.0]
    assert scores.details["exact"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_value_that_is_not_finite_is_not_ranked():
    scores = rank(inner([5.0, NAN, float("inf")]))(batch_of([0, 0, 0]))
    assert scores.valid.tolist() == [True, False, False]


def test_no_images():
    assert len(rank(inner([]))(batch_of([]))) == 0


def test_prompts_are_the_other_rewards_affair():
    class Picky:
        def __call__(self, batch): ...

        def check_prompt(self, prompt, metadata):
            raise PromptError("no words")

    with pytest.raises(PromptError):
        rank(Picky()).check_prompt("p", {})
    rank(inner([])).check_prompt("p", {})


# By name, through the host.


@pytest.fixture(scope="module")
def host() -> Host:
    return load_host()


def noise(n):
    """Images whose JPEGs grow in size."""
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(noise * torch.linspace(0, 1, n).view(-1, 1, 1, 1), ["p"] * n, [{}] * n, torch.zeros(n).long())


def test_of_a_registered_reward_with_options(host):
    batch = noise(5)
    scores = compose(["rank,of=jpeg_incompressibility; variant = ddpo"], host=host)(batch)
    kilobytes = scores.details["rank/kilobytes"]
    assert all(a < b for a, b in pairwise(kilobytes.tolist()))
    assert scores.values.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert scores.details["rank/value"].equal(kilobytes)  # ddpo: not divided by 500


def test_defaults_reach_the_reward_inside(host):
    defaults = {"jpeg_compressibility": {"variant": "ddpo"}}
    raw = [
        compose([spec], host=host, defaults=defaults)(noise(3)).details
        for spec in ("rank,of=jpeg_compressibility", "rank,of=jpeg_compressibility;variant=nft")
    ]
    torch.testing.assert_close(raw[0]["rank/value"], -raw[0]["rank/kilobytes"])
    torch.testing.assert_close(raw[1]["rank/value"], -raw[1]["rank/kilobytes"] / 500)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rank", "rank needs of=NAME"),
        ("rank,of=", "rank needs of=NAME"),
        ("rank,of=rank", "'rank' cannot be made of itself"),
        ("rank,of=rank;of=jpeg_compressibility", "'rank' cannot be made of itself"),
        ("rank,of=jpeg_compressibility=2", "takes no weight"),
        ("rank,of=jpeg_compressibility;retry=2", "takes no on_error, retry, max_seconds"),
        ("rank,of=jpeg_compresibility", "Unknown reward.*Did you mean 'jpeg_compressibility'"),
        ("rank,of=jpeg_compressibility;varient=nft", "Did you mean 'variant'"),
        ("rank,off=ocr", "'rank' has no option 'off'.*It has of\\."),
    ],
)
def test_bad_specs(host, spec, message):
    with pytest.raises(UsageError, match=message):
        compose([spec], host=host)


def test_defaults_cannot_turn_in_a_circle(host):
    with pytest.raises(UsageError, match="cannot be made of itself"):
        compose(["rank,of=rank"], host=host, defaults={"rank": {"of": "rank"}})


def test_another_reward_of_groups_is_refused():
    with pytest.raises(ValueError, match="compares the images of a group itself"):
        rank(rank(inner([])))


# Groups that come in parts.


def test_ranks_of_batches_become_ranks_of_groups():
    from nft_core.scoring.scores import concatenate_scores

    values, groups = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 8.0]), torch.tensor([0, 1, 0, 1, 0, 1])
    valid = torch.tensor([True, True, True, False, True, True])

    def by_place(batch):
        rows = batch.images[:, 0, 0, 0].long()
        return Scores(values[rows], valid[rows])

    def batch(rows):
        images = torch.tensor(rows).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        return Batch(images, ["p"] * len(rows), [{}] * len(rows), groups[rows])

    ranked = Composed((Term("rank", 2.0, rank(by_place)), Term("plain", 1.0, by_place)), 10.0)
    for reward in (ranked, 2 * Composed((Term("rank", 1.0, rank(by_place)),)).map(torch.square) + 1):
        whole = reward(batch([0, 1, 2, 3, 4, 5]))
        parts = concatenate_scores([reward(batch(rows)) for rows in ([0, 1], [2, 3], [4, 5])])
        assert not parts.values[valid].equal(whole.values[valid])
        again = reward.regroup(parts, groups)
        assert again.values[valid].equal(whole.values[valid])
        assert again.valid.equal(whole.valid)
        assert again.details.keys() == whole.details.keys()
    again = ranked.regroup(concatenate_scores([ranked(batch([r])) for r in range(6)]), groups)
    assert again.values[valid].tolist() == [17.0, 11.0, 15.0, 13.0, 20.0]  # 10 + 2 rank + value
    assert again.parts["plain"].scores.values[valid].equal(values[valid])
