"""A run does not depend on how its images are spread over batches and processes."""

import json
import os
import sys
from pathlib import Path

import forks
import pytest
import tiny_run
import torch

from nft_core.errors import NftError
from nft_core.scoring.scores import concatenate_scores
from nft_plugins import Scores

SCRIPT = Path(__file__).with_name("tiny_run.py")


def run(tmp_path, folder, name, *settings, processes=1):
    out = tmp_path / f"{name}.json"
    command = [sys.executable, SCRIPT, folder, out, *settings]
    forks.run_together(command, processes, os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text())


def figures(result):
    """Losses, gradient norms and rewards, in order."""
    rows = []
    for record in result["records"]:
        rows += [record[k] for k in ("loss", "policy_loss", "kl", "grad_norm", "drift") if k in record]
        rows += [record["rewards"]["total"][k] for k in ("mean", "std", "valid")]
    return rows


def check_same(ours, reference):
    """Two runs have learned the same, but for rounding: sums of other orders differ by about 1e-7 each."""
    assert figures(ours) == pytest.approx(figures(reference), rel=1e-4, abs=1e-6)
    # Adam divides a gradient by its own size: where that is 6e-8 and others are 3e-3, rounding moves a weight
    # by 3e-6 of lr = 1e-3, in one process as in two. A sum of weights near 0 has no size to compare that with.
    assert ours["weights"] == pytest.approx(reference["weights"], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_groups_are_compared_over_processes(sd3_folder, tmp_path):
    settings = "objective=dgpo,beta_dpo=5", "updates_per_epoch=1"
    one = run(tmp_path, sd3_folder, "one", "microbatch=16", *settings)
    check_same(run(tmp_path, sd3_folder, "two", "microbatch=3", *settings, processes=2), one)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, sd3_folder):
    return run(tmp_path_factory.mktemp("ref"), sd3_folder, "ref", "microbatch=4")


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        pytest.param(["microbatch=16"], 1, marks=pytest.mark.slow),
        (["microbatch=3", "rollout_batch=5"], 1),
        pytest.param(["microbatch=4"], 2, marks=pytest.mark.slow),
        (["microbatch=16", "rollout_batch=3"], 2),
    ],
)
def test_same_losses(settings, processes, reference, sd3_folder, tmp_path):
    check_same(run(tmp_path, sd3_folder, "ours", *settings, processes=processes), reference)


def test_ranks_are_of_whole_groups(sd3_folder, tmp_path):
    """Groups of 4 lie in one batch, and are spread over batches of 3 and 2 processes."""
    runs = [
        run(tmp_path, sd3_folder, f"ranked-{processes}", "rewards=['ranked']", *settings, processes=processes)
        for settings, processes in (([], 1), (["rollout_batch=3"], 1), (["rollout_batch=3"], 2))
    ]
    for other in runs[1:]:
        check_same(other, runs[0])
        for ours, theirs in zip(other["records"], runs[0]["records"], strict=True):
            assert ours["rewards"]["rank"] == pytest.approx(theirs["rewards"]["rank"])
            assert ours["details"] == pytest.approx(theirs["details"], rel=1e-4)


@pytest.mark.parametrize(
    # test_sharding.py compares shared weights that are all trained with those of one process too.
    "trained",
    ["lora_rank=4", pytest.param("lora_rank=0", marks=pytest.mark.slow)],
)
def test_processes_that_share_the_weights_learn_the_same(trained, sd3_folder, tmp_path):
    """Two processes share 15 images, so that one always has a batch more."""
    sizes = ["group_size=3", "prompts_per_epoch=5", "updates_per_epoch=1", "microbatch=1", "rollout_batch=7"]
    tiny_run.main(sd3_folder, tmp_path / "alone.json", *sizes, trained)
    alone = json.loads((tmp_path / "alone.json").read_text())
    options = ["parallel=fsdp", "gradient_checkpointing=true"]
    shared = run(tmp_path, sd3_folder, "shared", *sizes, trained, *options, processes=2)
    check_same(shared, alone)
    assert any(r["rewards"]["total"]["valid"] % 2 for r in shared["records"] if r["event"] == "epoch")
    ours, whole = shared["held"], alone["held"]
    if trained == "lora_rank=0":
        assert all(2 * ours[name] < 1.01 * whole[name] for name in whole)  # Moments have a number for all.
    else:
        lora = whole["copies"] // 2  # Of the old and the EMA weights.
        assert 2 * (ours["transformer"] - lora) == whole["transformer"] - lora


def test_the_figures_notice_a_difference(reference, sd3_folder, tmp_path):
    other = figures(run(tmp_path, sd3_folder, "other", "microbatch=4", "seed=1"))
    assert other != pytest.approx(figures(reference), rel=1e-2, abs=1e-6)


def test_invalid_samples_stay_out(reference):
    counts = [r["rewards"]["total"]["valid"] for r in reference["records"] if r["event"] == "epoch"]
    assert all(0 < valid < 16 for valid in counts)


def test_what_fails_or_differs_in_one_process_is_told_in_all(tmp_path):
    """What one process calls `a` is never added to what another calls `b`, and none waits in vain."""
    script = tmp_path / "details.py"
    script.write_text(
        "import sys, torch\n"
        "from nft_core.parallel.processes import list_owned, process_group, rank, fail_together\n"
        "from nft_core.errors import NftError, PeerError\n"
        "from nft_core.scoring.scores import gather_scores\n"
        "from nft_plugins import Scores\n"
        "cpu = torch.device('cpu')\n"
        "with process_group(cpu, 900), open(f'{sys.argv[1]}/{rank()}', 'w') as told:\n"
        "    names = ('a', 'b')[:: 1 - 2 * rank()]\n"
        "    scores = Scores.of(torch.ones(2), **{n: torch.full((2,), float(ord(n))) for n in names})\n"
        "    try:\n"
        "        gather_scores(scores, list_owned(4), 4, cpu)\n"
        "    except NftError as error:\n"
        "        print(error, file=told)\n"
        "    alike = Scores.of(torch.ones(2), a=torch.full((2,), 1.0 + rank()))\n"
        "    assert gather_scores(alike, list_owned(4), 4, cpu).details['a'].tolist() == [1, 2, 1, 2]\n"
        "    try:\n"
        "        with fail_together(cpu):\n"
        "            {}['x'] if rank() else None\n"
        "    except (KeyError, PeerError) as error:\n"
        "        print(type(error).__name__, file=told)\n"
    )
    forks.run_together([sys.executable, script, tmp_path], 2, os.environ)
    for rank, names, error in ((0, "a, b", "PeerError"), (1, "b, a", "KeyError")):
        assert (tmp_path / str(rank)).read_text().splitlines() == [
            "A reward does not keep the contract: it must give the same details in the same order in every "
            f"process, and here it gave {names}, elsewhere others.",
            error,
        ]


def test_gradients_are_summed(tmp_path):
    """One process has none for one parameter; no process has any for another, which keeps none."""
    script = tmp_path / "gradients.py"
    script.write_text(
        "import torch\n"
        "from nft_core.parallel.processes import process_group, rank, sum_gradients\n"
        "with process_group(torch.device('cpu'), 900):\n"
        "    both, one, none = (torch.nn.Parameter(torch.zeros(2, n)) for n in (1, 2, 3))\n"
        "    both.grad = torch.full_like(both, 1.5 + rank())\n"
        "    one.grad = torch.arange(4.0).view(2, 2) if rank() else None\n"
        "    sum_gradients(iter([both, none, one]))\n"
        "    assert both.grad.tolist() == [[4], [4]] and one.grad.tolist() == [[0, 1], [2, 3]]\n"
        "    assert none.grad is None\n"
    )
    forks.run_together([sys.executable, script], 2, os.environ)


def test_details_differ_between_batches():
    some, none = Scores.of(torch.ones(1), a=torch.ones(1)), Scores.of(torch.ones(1))
    for batches in ([some, none], [none, some]):
        with pytest.raises(NftError, match="same details, got (a, and then none|none, and then a)"):
            concatenate_scores(batches)
