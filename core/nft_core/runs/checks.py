"""What can be refused by names and small files, before PyTorch is imported or a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import NftError, UsageError, shorten_error
from ..host.host import Host
from ..host.specs import RewardSpec
from ..settings import Settings

#: What helps where there is no network.
OFFLINE = "--tiny brings small stand-ins of some rewards, which work offline too."


def check_rewards(
    specs: Iterable[RewardSpec], host: Host, announce: Callable[[str], None] = lambda text: None
) -> None:
    """Raise UsageError or NftError for what rewards lack here, or for an option that is wrong; load nothing.

    What names, small files and the source of rewards tell comes first. PyTorch is imported last.

    announce: told before that.
    """
    specs = list(specs)
    for spec in specs:
        host.require_reward(spec.name)
    for spec in specs:
        host.check_reward_options(spec.name, spec.options)
    for spec in specs:
        check_reward_files(spec, host)
    announce("loading PyTorch")
    for spec in specs:
        host.check_reward(spec.name, spec.options)


def check_reward_files(spec: RewardSpec, host: Host) -> None:
    """Raise NftError where a reward's files were not fetched yet, and the hub cannot be reached now."""
    from ..models.hub import ask_hub, find_unfetched

    # With options a reward may load other files than its card names.
    missing = [] if spec.options else find_unfetched(host.find_reward(spec.name).info.files)
    if not missing:
        return
    try:
        ask_hub(missing[0], "config.json")
    except ConnectionError as error:
        raise NftError(
            f"The reward {spec.title!r} needs files of {' and '.join(missing)}, which were not fetched yet: "
            f"{shorten_error(error)} Run it once where there is a network. {OFFLINE}"
        ) from error
    except OSError:  # The hub answers; that it has no such file, or wants a login, says nothing of the others.
        return


def check_any_weight(weights: Iterable[float]) -> None:
    """Raise UsageError where every reward has the weight 0."""
    if not any(weights):
        raise UsageError("Every reward has the weight 0, so nothing would be learned: give one another weight.")


def check_sizes(settings: Settings, prompts: int) -> None:
    """Raise UsageError, with the nearest possible size, where there are fewer prompts than an epoch takes."""
    if settings.prompts_per_epoch > prompts:
        raise UsageError(
            f"prompts_per_epoch = {settings.prompts_per_epoch}, but there are {prompts} training prompts "
            f"to choose from: use --set prompts_per_epoch={prompts} or less, or give more prompts."
        )


def check_shares(settings: Settings, held_out: int) -> None:
    """Raise UsageError where the run's processes are more than the images of an epoch or of an evaluation."""
    from ..parallel.processes import world_size

    images = min(settings.prompts_per_epoch * settings.group_size, held_out * settings.eval_images)
    if images < world_size():
        raise UsageError(
            f"{images} images cannot be shared by {world_size()} processes: give more prompts, a larger "
            "group_size or eval_images, or use fewer processes."
        )
