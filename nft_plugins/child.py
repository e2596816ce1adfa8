"""The process of a reward with an environment of its own: `python -m nft_plugins.child SOCKET LIFE`.

nft-hub starts it with that environment's Python, and asks it over a socket in the messages of `wire`. What the
reward prints goes to standard error, so it cannot get between the messages. The process ends with the one that
started it, however that ends: see `watch_parent`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import platform
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from .data import PromptError, Scores
from .hookspecs import CONTRACT
from .rules import OFFERED, read_types, resolve_factory
from .wire import (
    VERSION,
    Message,
    WireError,
    decode_message,
    encode_message,
    has_torch,
    pack_scores,
    read_message,
    unpack_batch,
    unpack_scores,
)

if TYPE_CHECKING:
    from .interfaces import Reward

Reply = tuple[dict[str, Any], dict[str, Any]]
#: Packages whose versions the parent is told, beside those that it asks for.
PACKAGES = ("nft-plugins", "torch", "transformers", "numpy", "safetensors")


def main() -> None:
    """Answer requests until the parent closes the socket."""
    channel, life = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    watch_parent(channel, life)
    os.dup2(2, 1)
    # Ctrl-C is for the parent, which decides what becomes of a call that is under way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hello = {"wire": VERSION, "contract": CONTRACT, "python": platform.python_version()}
    channel.sendall(encode_message(hello))
    keeper = Keeper()
    while (data := read_message(channel.recv)) is not None:
        head, tensors = answer(keeper, data)
        try:
            reply = encode_message(head, tensors)
        except Exception as error:  # Details that are no tensors, and whatever else a reward may return.
            reply = encode_message(describe_failure(error))
        channel.sendall(reply)


def watch_parent(channel: socket.socket, life: int) -> None:
    """Start a process that kills this one, and all that this one starts, when the parent is gone.

    life: a pipe that nobody writes to, whose other end closes with the parent. A process watches it and no
    thread, for a thread gets no turn while a library holds Python's lock.
    """
    group = os.getpid()  # The parent has made this process the first of a group.
    channel.set_inheritable(False)
    if os.fork():
        os.close(life)
        return
    channel.close()
    os.setsid()  # So that it is not in the group that it kills.
    for number in (0, 1, 2):
        os.close(number)
    while os.read(life, 1):
        pass
    with suppress(OSError):  # It has ended already.
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


class Keeper:
    """Keeps the reward between requests. offloaded: what of it lies in the CPU's memory between calls."""

    def __init__(self) -> None:
        self.reward: Reward | None = None
        self.device = "cpu"
        self.offload = False
        self.offloaded: list[Any] = []


def answer(keeper: Keeper, data: bytes) -> Reply:
    """Answer a request. An error of the reward is an answer too."""
    try:
        message = decode_message(data)
        request = REQUESTS.get(str(message.head.get("request")))
        if request is None:
            raise WireError(f"expected a request of {', '.join(REQUESTS)}, got {message.head.get('request')!r}")
        return request(keeper, message)
    except BaseException as error:  # Extensions in Rust or C++ raise errors that are no Exception.
        return describe_failure(error), {}


def describe_failure(error: BaseException) -> dict[str, Any]:
    """Describe an error for the parent: its kind, its text, and the line of the reward that raised it."""
    kind = "failed"
    if isinstance(error, PromptError):
        kind = "prompt"
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        kind = "memory"
    elif isinstance(error, OptionError):
        kind = "options"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(("<", str(Path(__file__).parent)))]
    where = f"{Path(theirs[-1].filename).name}, line {theirs[-1].lineno}" if theirs else ""
    try:
        text = str(error)
    except Exception:  # Its own error may be unable to say what it is.
        text = ""
    return {"error": kind, "type": type(error).__name__, "text": text[:10_000], "where": where}


class OptionError(ValueError):
    """The reward's factory does not take the options that it is given."""


def make(keeper: Keeper, message: Message) -> Reply:
    """Make the reward: import its factory, and call it with the user's options."""
    head = message.head
    set_numbers(head.get("numbers") or {})
    factory = resolve_factory(head["factory"])
    keeper.device, keeper.offload = str(head["device"]), bool(head.get("offload"))
    made = factory(**fit_options(factory, head["options"], {"device": keeper.device}))
    if not callable(made):
        raise TypeError(f"the factory {head['factory']} gave {type(made).__name__}, which is no reward")
    keeper.reward = made
    put_away(keeper)
    has = [name for name in ("check_prompt", "regroup") if hasattr(made, name)]
    names = dict.fromkeys((*PACKAGES, *head.get("packages", ())))
    packages = {name: version for name in names if (version := find_version(name))}
    return {"has": has, "needs_floats": bool(getattr(made, "needs_floats", False)), "packages": packages}, {}


def find_version(package: str) -> str:
    """Find the version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def set_numbers(numbers: Mapping[str, Any]) -> None:
    """Let torch compute as it does in the parent: its threads, and its precision of float32."""
    if not has_torch() or not numbers:
        return
    import torch

    torch.set_num_threads(int(numbers["threads"]))
    torch.set_float32_matmul_precision(str(numbers["precision"]))
    torch.backends.cudnn.allow_tf32 = bool(numbers["cudnn_tf32"])


def fit_options(
    factory: Callable[..., Any], options: Mapping[str, Any], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """Convert the user's options to the types of the factory's parameters, and add what of `offered` it takes.

    Raises OptionError for an option that the factory does not have.
    """
    parameters = inspect.signature(factory).parameters
    known = {n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if "make_reward" in known:
        raise OptionError("a reward that is made of others runs in the process: the others may have a child")
    hints = read_types(factory)
    # Types that this Python cannot evaluate are those of the defaults.
    kinds = {name: hints.get(name) or type(parameters[name].default) for name in known}
    given = {name: convert(value, kinds.get(name, Any)) for name, value in options.items()}
    given = {name: value for name, value in offered.items() if name in known} | given
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        raise OptionError(f"{error}; its options are {', '.join(sorted(known - OFFERED)) or 'none'}") from error
    return given


def convert(value: Any, kind: Any) -> Any:
    """Convert an option's value to a type. On the command line all values are text, and text may be JSON."""
    if not isinstance(value, str):
        return value
    kinds = get_args(kind) if get_origin(kind) is Union or type(kind).__name__ == "UnionType" else (kind,)
    try:
        plain: Any = None if value.lower() == "none" else json.loads(value)
    except ValueError:
        plain = value
    for one in kinds:
        if get_origin(one) is Literal:
            for choice in get_args(one):
                if choice in (value, plain) and type(choice) in (str, type(plain)):
                    return choice
        elif one is float and type(plain) in (int, float):
            return float(plain)
        elif one is not str and isinstance(one, type) and type(plain) is one:
            return plain
    if Path in kinds:
        return Path(value)
    return value if str in kinds else plain


def score(keeper: Keeper, message: Message) -> Reply:
    """Score a batch."""
    reward = need_reward(keeper)
    return ask_for_scores(keeper, lambda: reward(unpack_batch(message, keeper.device)))


def regroup(keeper: Keeper, message: Message) -> Reply:
    """Let the reward compare the images of whole groups."""
    reward: Any = need_reward(keeper)
    scores, groups = unpack_scores(message), message.tensors["groups"]
    return ask_for_scores(keeper, lambda: reward.regroup(scores, groups))


def ask_for_scores(keeper: Keeper, ask: Callable[[], object]) -> Reply:
    """Let the reward make scores, while what it has is on its device."""
    bring_back(keeper)
    try:
        with without_gradients():
            head, tensors = pack_checked(ask())
        # Now: scores on a GPU would be put away with the rest.
        return head, {name: t.cpu() if hasattr(t, "cpu") else t for name, t in tensors.items()}
    finally:
        put_away(keeper)


def pack_checked(scores: object) -> Reply:
    """Make the message of scores. Raises TypeError for what is none."""
    if not isinstance(scores, Scores):
        raise TypeError(f"a reward must return Scores, got {type(scores).__name__}")
    return pack_scores(scores)


def check_prompt(keeper: Keeper, message: Message) -> Reply:
    """Ask the reward whether it can ever score a prompt. PromptError is the answer where it cannot."""
    reward: Any = need_reward(keeper)
    reward.check_prompt(message.head["prompt"], message.head["metadata"])
    return {}, {}


def need_reward(keeper: Keeper) -> Reward:
    if keeper.reward is None:
        raise WireError("the reward must be made before it is asked")
    return keeper.reward


def without_gradients() -> Any:
    """Switch off what gradients need, where there is torch."""
    if not has_torch():
        return nullcontext()
    import torch

    return torch.no_grad()


REQUESTS: dict[str, Callable[[Keeper, Message], Reply]] = {
    "make": make,
    "score": score,
    "regroup": regroup,
    "check_prompt": check_prompt,
}


def put_away(keeper: Keeper) -> None:
    """Give the GPU's memory back: copy what lies there to the CPU's, and free it."""
    if not keeper.offload or "torch" not in sys.modules:
        return
    import gc

    import torch

    if not torch.cuda.is_initialized():
        return
    # In this process everything on a GPU is the reward's. Tensors that share memory share a storage too.
    gc.collect()
    storages: dict[int, Any] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.is_cuda:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage
    keeper.offloaded = []
    for storage in storages.values():
        size = storage.nbytes()
        kept = torch.UntypedStorage(size, device="cpu").copy_(storage, False)
        storage.resize_(0)
        keeper.offloaded.append((storage, kept, size))
    torch.cuda.empty_cache()


def bring_back(keeper: Keeper) -> None:
    """Copy to the GPU what `put_away` has taken from it, to the storages that the reward's tensors have."""
    for storage, kept, size in keeper.offloaded:
        storage.resize_(size)
        storage.copy_(kept, False)
    keeper.offloaded = []


if __name__ == "__main__":
    main()
