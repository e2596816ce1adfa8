"""Objectives in the loop: what they are given, what is made of what they return, and what is refused."""

from dataclasses import dataclass

import pytest
import torch
from toy import make

from nft_core.api.given import read_objective
from nft_core.errors import NftError, UsageError
from nft_core.host.discovery import Registered
from nft_core.host.host import load_host
from nft_core.planning.footprint import count_footprint
from nft_core.runs.resume import describe_changes
from nft_core.runs.setup import make_objective
from nft_core.settings import make_settings
from nft_core.training.groups import compare_groups
from nft_core.training.loop import sample_images, train
from nft_core.training.losses import weigh_images
from nft_core.training.microbatches import make_microbatches
from nft_plugins import Objective, ObjectiveInfo, mean_per_sample


@dataclass(frozen=True)
class Matching(Objective):
    """Flow matching, each image by its advantage."""

    power: float = 2.0

    def loss(self, batch):
        return batch.weights * mean_per_sample((batch.v_theta - batch.target).abs() ** self.power)


def wrong(**members):
    return type("Wrong", (Matching,), members)()


def run_with(tmp_path, own=None, **settings):
    """Train the toy, with our own objective or that of the settings; returns it and the epochs' records."""
    run, records = make(tmp_path, **settings), []
    if own:
        run.objective = own
        run.at.sums = [0.0] * (5 + len(own.figures))
    run.observe = lambda hook, **told: hook == "nft_epoch_finished" and records.append(told["record"])
    train(run)
    return run, records


def live(run):
    return torch.cat([p.detach().flatten() for p in run.policy.parameters])


def test_an_objective_that_needs_no_old_policy_is_given_none(tmp_path):
    asked = []

    def loss(self, batch):
        asked.append((batch.v_old, batch.v_ref, batch.group))
        return Matching.loss(self, batch)

    run, records = run_with(tmp_path, wrong(loss=loss))
    assert set(asked) == {(None, None, None)}
    assert all(record["old_gap"] is None and "objective" not in record for record in records)
    assert all(record["kl"] > 0 for record in records[1:])  # The KL term is every objective's.
    assert (live(run) - live(make(tmp_path))).abs().max() > 1e-3


def test_figures_are_averaged_like_the_loss(tmp_path):
    def loss(self, batch):
        own = Matching.loss(self, batch)
        return own, {"same": own, "one": torch.ones_like(own)}

    _, records = run_with(tmp_path, wrong(figures=("same", "one"), loss=loss))
    for record in records:
        assert record["objective"] == {"same": pytest.approx(record["policy_loss"]), "one": 1.0}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"weigh": lambda self, a, s, g: a[:3]},
            r"a weight for each image, a tensor of the shape \[8\].*got \[3\]",
        ),
        ({"weigh": lambda self, a, s, g: a / 0}, "must give finite weights"),
        (
            {"loss": lambda self, b: b.v_theta.mean()},
            r"a loss for each image, a tensor of the shape \[3\].*got \[\]",
        ),
        ({"loss": lambda self, b: None}, "a loss for each image.*no tensor"),
        ({"figures": ("error",)}, "the figure 'error' for each image.*no tensor"),
        (
            {"loss": lambda self, b: Matching.loss(self, b) * torch.nan},
            "The objective 'nft' gave a loss that is not finite",
        ),
        (
            {"compares_groups": True, "compare": lambda self, b: b.x_0},
            r"a number to compare for each image.*got \[3, 3, 1, 1\]",
        ),
    ],
)
def test_what_no_objective_may_return(tmp_path, members, message):
    with pytest.raises(NftError, match=message):
        run_with(tmp_path, wrong(**members), max_nonfinite=2)


DGPO = "dgpo,beta_dpo=5,clip_range=0.05"


def test_groups_share_times_and_noise_and_are_compared_whole(tmp_path):
    run = make(tmp_path, objective=DGPO, microbatch=3, updates_per_epoch=1)
    rollout = sample_images(run, epoch=1)
    weights = weigh_images(run, rollout)
    images = torch.tensor([0, 2, 3, 4, 6, 7])  # The second of each four has no score.
    means = compare_groups(run, rollout, images, weights)
    run.settings = run.settings.model_copy(update={"microbatch": 8})
    (batch,) = make_microbatches(run, rollout, images, weights)
    for k in range(2):
        assert len(batch.t[k][:3].unique()) == len(batch.t[k][3:].unique()) == 1
        noise = batch.x_t[k] - (1 - batch.t[k].view(-1, 1, 1, 1)) * batch.x_0
        torch.testing.assert_close(noise[:3], noise[:1].expand_as(noise[:3]))
        target = (batch.x_t[k] - batch.x_0) / batch.t[k].view(-1, 1, 1, 1)
        with torch.no_grad():
            v = run.policy.velocity(batch.x_t[k], batch.t[k], batch.condition)
            with run.policy.use_reference():
                v_ref = run.policy.velocity(batch.x_t[k], batch.t[k], batch.condition)
        gap = (v - target).square().mean((1, 2, 3)) - (v_ref - target).square().mean((1, 2, 3))
        expected = torch.stack([(weights[images] * gap)[part].mean() for part in (slice(3), slice(3, 6))])
        torch.testing.assert_close(means[k], expected, atol=1e-6, rtol=1e-4)


def test_dgpo_does_not_depend_on_the_microbatch(tmp_path):
    one, other = (run_with(tmp_path, objective=DGPO, microbatch=m)[0] for m in (3, 8))
    torch.testing.assert_close(live(one), live(other), atol=2e-6, rtol=1e-4)
    against_old = run_with(tmp_path, objective=f"{DGPO},against=old")[0]
    assert (live(one) - live(against_old)).abs().max() > 1e-4


@pytest.mark.parametrize("objective", ["awm", "rft", "rft,beta=0.5", "dgpo"])
def test_the_others_learn_something_else_than_nft(tmp_path, objective):
    ours, records = run_with(tmp_path, objective=objective)
    nft, _ = run_with(tmp_path)
    assert (live(ours) - live(nft)).abs().max() > 1e-3
    assert {*records[-1].get("objective", {})} == {*ours.objective.figures}


def made(**settings):
    return make_objective(make_settings(settings), load_host())


def test_options_take_settings_of_their_name_where_they_are_not_given():
    assert (made(beta=0.3).beta, made(beta=0.3, objective="nft,beta=0.7").beta) == (0.3, 0.7)
    assert made(objective={"name": "nft", "beta": 2}, advantage_clip=3.0).advantage_clip == 3.0
    assert made(objective="awm", advantage_clip=3.0, beta=9.0).advantage_clip == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "nfd"}, "Unknown objective 'nfd'. Did you mean 'nft'"),
        ({"objective": "awm,wighting=t"}, "no option 'wighting'. Did you mean 'weighting'"),
        ({"objective": "awm,weighting=cubic"}, "input should be 'uniform'"),
        ({"objective": "awm=2"}, "it has no weight"),
        ({"objective": "nft,beta=-1"}, "beta must be above 0"),
        ({"objective": "dgpo", "kl_weight": 0}, "the reference, which kl_weight = 0 leaves out"),
        ({"objective": "<Mine>"}, r"nft_core.resume\(FOLDER, objective=...\)"),
        ({"objective": "MINE:Nothing"}, "not an objective: its class must inherit"),
        ({"objective": "MINE:Absent"}, "no function or class 'Absent'"),
        ({"objective": "MINE:Several", "train_times_count": 1}, "at least 2 training times for an image"),
    ],
)
def test_objectives_that_cannot_be(tmp_path, settings, message):
    file = tmp_path / "mine.py"
    file.write_text(
        "from nft_plugins import Objective\n\n\nclass Nothing:\n    pass\n\n\n"
        "class Several(Objective):\n    least_times = 2\n"
    )
    settings["objective"] = settings["objective"].replace("MINE", str(file))
    with pytest.raises(NftError, match=message):
        made(**settings)


def test_a_class_in_a_file_has_options(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from dataclasses import dataclass\n\nfrom nft_plugins import Objective\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Objective):\n    power: float = 2.0\n    beta: float = 1.0\n"
    )
    mine = made(objective=f"{file}:Mine,power=3", beta=0.25)
    assert (mine.power, mine.beta) == (3.0, 0.25)


def test_objectives_in_python():
    host = load_host()
    assert read_objective(host, "awm,power=0.5") == "awm,power=0.5"
    assert read_objective(host, {"name": "awm"}) == {"name": "awm"}
    name, mine = read_objective(host, Matching), Matching(power=4.0)
    assert name == "<Matching>"
    assert make_objective(make_settings({"objective": name}), host).power == 2.0
    assert make_objective(make_settings({"objective": read_objective(host, mine)}), host) is mine
    with pytest.raises(UsageError, match="that inherits from nft_plugins.Objective"):
        read_objective(host, len)


def test_another_objective_changes_what_is_learned():
    grave, _ = describe_changes({"objective": "nft"}, make_settings({"objective": "awm"}))
    assert grave == ["objective ('nft' before, 'awm' now)"]
    assert describe_changes({}, make_settings()) == ([], [])  # A run of a version that had one alone.


def test_plans_count_the_objective_itself(sd3_folder):
    asked = []

    class Recorded(Matching):
        needs_old = True

        def loss(self, batch):
            asked.append((batch.v_theta.is_meta, batch.v_old.shape == batch.x_0.shape, batch.v_ref))
            return super().loss(batch)

    host = load_host()
    host.objectives["recorded"] = Registered(ObjectiveInfo("recorded", "mine", Recorded), ())
    s = make_settings({"model": str(sd3_folder), "objective": "recorded", "lora_rank": 4, "steps": 2})
    f = count_footprint(s, host, torch.device("cpu"))
    assert set(asked) == {(True, True, None)}
    assert (f.needs_old, f.compares_groups) == (True, False)
