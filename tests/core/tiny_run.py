"""A short run on random weights, written as JSON: what the tests of invariance compare.

python tiny_run.py PIPELINE OUT.json [SETTING=VALUE ...]
"""

import json
import sys
from pathlib import Path

import torch

from nft_core.parallel.processes import process_group, rank
from nft_core.parallel.sharding import take_local_part
from nft_core.prompts import Prompt
from nft_core.runs.assembly import assemble_training
from nft_core.runs.setup import autocast_dtype
from nft_core.scoring.composer import Composed, Term
from nft_core.settings import make_settings, parse_assignment
from nft_core.training.loop import train
from nft_plugins import Scores
from nft_rewards.rank import Rank
from nft_solvers.sde import SDE

LETTERS = "abcdefgh"


def brightness(batch):
    """Red minus blue; one image in seven is marked invalid, by its own content."""
    red, _, blue = batch.images.mean((2, 3)).unbind(1)
    values = (red - blue).float()
    return Scores(values, (values * 1e4).long() % 7 != 0)


def ranked():
    """An image's rank in its group, and a little of brightness itself."""
    rank = Rank("brightness", make_reward=lambda spec: brightness)
    return Composed((Term("rank", 1.0, rank), Term("brightness", 0.5, brightness)))


def short_run(folder, out, *assignments):
    """The records and the policy of a run in this process, or in each of several."""
    records, training = start(folder, out, *assignments)
    train(training)
    return records, training.policy


def start(folder, out, *assignments):
    """The records and the loop's parts, before the first epoch."""
    settings = make_settings(
        {
            "model": str(folder),
            "rewards": ["brightness"],
            "epochs": 2,
            "steps": 3,
            "group_size": 4,
            "prompts_per_epoch": 4,
            "train_times_count": 2,
            "lora_rank": 4,
            "lr": 1e-3,
            "kl_weight": 0.1,
            "max_sequence_length": 8,
            "eval_every": 1,
            "eval_images": 2,
            "rollout_batch": 8,
        },
        dict(parse_assignment(a) for a in assignments),
    )
    records = []

    def observe(hook, **arguments):
        if "record" in arguments:
            records.append(arguments["record"])

    prompts = [Prompt(f"{a} {b}", {}) for a in LETTERS[:3] for b in LETTERS[3:6]]
    held_out = [Prompt(f"{a} a", {}) for a in LETTERS[6:]]
    device = torch.device("cpu")
    from nft_core.models.sd3 import SD3

    dtype = autocast_dtype(settings, device) if settings.lora_rank else None
    model = SD3(str(folder), max_sequence_length=8, dtype=dtype or torch.float32)
    reward = ranked() if settings.rewards == ["ranked"] else brightness
    training = assemble_training(settings, model, reward, SDE(), prompts, held_out, device, Path(out))
    training.observe, training.save = observe, lambda: None
    return records, training


def held(training):
    """Bytes of this process's weights, by what they are."""
    policy, optimizer = training.policy, training.optimizer

    def size(tensors):
        return sum(take_local_part(x).nbytes for x in tensors if isinstance(x, torch.Tensor))

    return {
        "transformer": size(policy.model.transformer.parameters()),
        "copies": size([*policy._old, *(policy._ema or ()), *(policy._reference or ())]),
        "moments": size(v for p in policy.parameters for v in optimizer.state[p].values()),
    }


def main(folder, out, *assignments):
    torch.set_num_threads(1)
    with process_group(torch.device("cpu"), 900):
        records, training = start(folder, Path(out).parent, *assignments)
        train(training)
        state = training.policy.state()
        if rank() == 0:
            weights = [float(w.double().sum()) for name, w in state.items() if name.startswith("live.")]
            result = {"records": records, "weights": weights, "held": held(training)}
            Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
