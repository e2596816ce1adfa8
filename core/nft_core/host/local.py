"""Loads objects by `FILE.py:NAME` or `MODULE:NAME`, and makes rewards of plain functions."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
import typing
from collections.abc import Callable, Mapping
from contextlib import chdir
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from nft_plugins import Batch, ObjectiveInfo, ObserverInfo, RewardInfo, Scores
from nft_plugins.rules import OFFERED

from ..errors import NftError, UsageError, describe_error, locate_error, missing_part
from .discovery import Registered
from .lending import keep_state
from .sketches import list_definitions

if TYPE_CHECKING:
    from torch import Tensor

#: Cards of what `make_class_card` makes.
Info = TypeVar("Info", ObserverInfo, ObjectiveInfo)
#: What a function may take by name: fields of the batch, or the batch itself.
FIELDS = ("images", "prompts", "metadata", "groups", "uint8", "pil", "batch")


#: Whether a user's file is being imported. What it composes meanwhile is loaded later, by the run.
importing: ContextVar[bool] = ContextVar("importing", default=False)


def is_reference(name: str) -> bool:
    """Tell whether a name is `FILE.py:NAME` or `MODULE:NAME`."""
    location, colon, attribute = name.rpartition(":")
    return bool(colon) and location != "" and attribute.isidentifier()


def load_object(reference: str) -> Any:
    """Load the object behind `FILE.py:NAME`, the file as seen from the current folder, or `MODULE:NAME`.

    Raises UsageError for a file, a module or a name that is not there, and NftError for a file that cannot
    be imported.
    """
    location, _, attribute = reference.rpartition(":")
    if (known := list_definitions(location, attribute)) is not None:
        raise missing_part(location, "function or class", attribute, known)
    token = importing.set(True)
    try:
        with chdir(Path.cwd()):  # Some files change the folder when they are imported.
            module = import_file(Path(location)) if location.endswith(".py") else import_module(location)
    except NftError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NftError(f"Importing {location} raised {describe_error(error)}{locate_error(error)}.") from error
    finally:
        importing.reset(token)
    if not hasattr(module, attribute):
        own = [n for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__]
        mine = [n for n in own if not n.startswith("_") and callable(vars(module)[n])]
        raise missing_part(location, "function or class", attribute, mine)
    return getattr(module, attribute)


def import_file(path: Path) -> ModuleType:
    """Import a file, which may import the modules beside it, as with `python FILE.py`."""
    if not path.is_file():
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UsageError(
            f"There is no file {path}{place}: expected FILE.py:NAME. If a run's file has moved, give its new "
            "place with the option that named it, such as --reward or --observer."
        )
    path = path.resolve()
    name = f"nft_local:{path}"
    if name not in sys.modules:
        # Python does this for a script that is started, and users expect it of their file here too.
        add_import_folder(path.parent)
        put_current_folder_last()
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # It ends in .py.
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # Before it runs: dataclasses look there.
        try:
            with keep_state(f"the import of {path.name}", making=True):
                spec.loader.exec_module(module)
        except BaseException:
            # A half-imported module must not be found by the next attempt.
            del sys.modules[name]
            raise
    return sys.modules[name]


def import_module(name: str) -> ModuleType:
    """Import a module that is installed or stands in the current folder."""
    add_import_folder(Path.cwd())
    try:
        root = name.partition(".")[0]
        if root not in sys.modules and importlib.util.find_spec(root) is None:
            raise ModuleNotFoundError(name=root)  # Before `keep_state`, which imports torch.
        with keep_state(f"the import of {name}", making=True):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"There is no module {name!r}, neither installed nor in {Path.cwd()}: expected MODULE:NAME or "
                "FILE.py:NAME."
            ) from error
        raise


def add_import_folder(folder: Path) -> None:
    """Add a folder to those that modules are imported from: last, so that none hides an installed one."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def put_current_folder_last() -> None:
    """Let modules beside a file come before those of the same name in the current folder.

    `python -m` has put that folder first, where it could also hide installed ones.
    """
    if sys.path[:1] in ([""], [str(Path.cwd())]):
        sys.path.append(sys.path.pop(0))


def make_local_card(name: str | Callable[..., Any]) -> Registered[RewardInfo]:
    """Make the card of a reward that nobody has registered: a reference, or a Python function, class or object.

    A class, or a function that takes no field of the batch, is a factory: its parameters are the options.
    A function that takes fields is the reward, and its other parameters are the options.
    """
    target = load_object(name) if isinstance(name, str) else name
    title = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    if not callable(target):
        raise UsageError(f"{title} is no reward: expected a function, a class or an object that can be called.")
    # Errors of its calls name it as figures do, without the path.
    short = title.rpartition(":")[2]
    return Registered(RewardInfo(title, describe_briefly(target), make_factory(target, short)), ())


def make_class_card(kind: type[Info], name: str) -> Registered[Info]:
    """Make the card of an observer or an objective by reference: a class or function that makes it, or it."""
    target = load_object(name)
    makes = inspect.isclass(target) or inspect.isroutine(target)
    return Registered(kind(name, describe_briefly(target), target if makes else lambda: target), ())


def describe_briefly(target: object) -> str:
    """The first line of an object's docstring; empty where it has none."""
    return (inspect.getdoc(target) or "").partition("\n")[0]


def make_factory(target: Callable[..., Any], title: str) -> Callable[..., Any]:
    """Make a factory of a reward from `target`; the options are its whole signature."""
    is_object = not inspect.isclass(target) and not inspect.isroutine(target)
    if is_object:
        return lambda: adapt_reward(target, title)
    taken = () if inspect.isclass(target) else list_batch_fields(target)
    signature = inspect.signature(target)
    options = [p for n, p in signature.parameters.items() if n not in taken]
    required = [p.name for p in options if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if required and not taken and not inspect.isclass(target) and not set(required) <= OFFERED:
        raise UsageError(
            f"{title} takes {', '.join(required)}: a reward takes what it needs of {', '.join(FIELDS)}, "
            "by these names; other parameters are options."
        )

    @functools.wraps(target)
    def make(**given: Any) -> Any:
        return FunctionReward(target, title, taken, given) if taken else adapt_reward(target(**given), title)

    if inspect.isclass(target):
        make.__annotations__ = read_annotations(target.__init__)
    # Options can be given by name alone, whatever stood before or behind them.
    make.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(kind=p.KEYWORD_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p for p in options]
    )
    return make


def read_annotations(function: Any) -> dict[str, Any]:
    """Read the types of a function's parameters; none where they cannot be evaluated."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


def list_batch_fields(function: Any) -> tuple[str, ...]:
    """List the fields of the batch among a function's parameters."""
    return tuple(n for n in inspect.signature(function).parameters if n in FIELDS)


def adapt_reward(made: Any, title: str) -> Any:
    """Make a reward of what a factory made. Raises NftError where that cannot be called."""
    if not callable(made):
        raise NftError(
            f"{title} gave {type(made).__name__}, not a reward: a function or an object with __call__."
        )
    return FunctionReward(made, title, list_batch_fields(made), {})


@dataclass(frozen=True, eq=False)
class FunctionReward:
    """Makes a reward of a function or object that takes fields of the batch and returns a number for each
    image.

    takes: the fields that it is given by name; without any, it is given the batch.
    """

    function: Callable[..., Any]
    title: str
    takes: tuple[str, ...]
    options: Mapping[str, Any]

    def __call__(self, batch: Batch) -> Scores:
        if not self.takes:
            return convert_to_scores(self.function(batch, **self.options), len(batch), self.title)
        given = {name: batch if name == "batch" else getattr(batch, name) for name in self.takes}
        return convert_to_scores(self.function(**given, **self.options), len(batch), self.title)

    def __getattr__(self, name: str) -> Any:
        # What else an object offers: check_prompt, regroup.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.function, name)


def convert_to_scores(result: Any, size: int, title: str) -> Scores:
    """Convert what a function returned to scores: None and what is not finite are invalid.

    Raises NftError for what is neither `Scores` nor `size` numbers in a list, an array or a tensor.
    """
    import torch

    if isinstance(result, Scores):
        return result
    try:
        values = convert_to_tensor(result)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NftError(
            f"The reward {title!r} must return {size} numbers, in a list, an array or a tensor, or Scores; got "
            f"{describe_value(result)}."
        ) from error
    if values.shape != torch.Size([size]):
        raise NftError(
            f"The reward {title!r} must return a number for each of {size} images, so the shape [{size}]; got "
            f"{list(values.shape)}."
        )
    return Scores.of(values)


def convert_to_tensor(result: Any) -> Tensor:
    """Convert numbers to a float32 tensor; what is None becomes NaN. Raises TypeError for other things."""
    import numpy as np
    import torch

    if isinstance(result, torch.Tensor):
        if result.is_complex():
            raise TypeError("complex")
        return result.detach().float()
    if isinstance(result, list | tuple):
        # One by one: a list may hold tensors, and None where an image could not be scored.
        return torch.tensor(
            [math.nan if v is None else float(v) for v in result], dtype=torch.float32, device="cpu"
        )
    if isinstance(result, np.ndarray):
        return torch.from_numpy(result.astype(np.float32))
    raise TypeError(type(result).__name__)


def describe_value(value: Any) -> str:
    """Describe a value by its type and the start of its text."""
    if value is None:
        return "None, as if its return were missing"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) < 60 else f"{type(value).__name__} {text[:60]}..."
