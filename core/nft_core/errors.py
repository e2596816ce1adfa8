"""Errors that a user can mend: one paragraph that says what was expected, what came and what to do."""

import errno
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class NftError(Exception):
    """Something failed; the command exits with 1."""

    exit_code = 1


class UsageError(NftError, ValueError):
    """The request cannot be met as it stands; the command exits with 2."""

    exit_code = 2


class Unreachable(NftError):
    """The process or the server that holds a reward is gone; another attempt may find it, or start it again."""


class SaveError(NftError):
    """A checkpoint could not be written."""


class CheckpointError(NftError):
    """A checkpoint is not whole, or does not fit the run."""


class Stopped(NftError):
    """The run was told to end: `signal` is 2 for Ctrl-C, 15 for SIGTERM."""

    def __init__(self, signal: int) -> None:
        super().__init__("Stopped.")
        self.signal = signal
        self.exit_code = 128 + signal  # as shells have it


class PeerError(NftError):
    """This process is well, and ends because another one of the run has failed."""

    exit_code = 75  # A code of its own, so that the launcher blames the process that failed and not this one.


#: Options of commands that errors name, and what is given instead in Python.
IN_PYTHON = {
    "--tiny": "tiny=True",
    "--reward": "rewards=...",
    "--observer": "observers=...",
    "--prompt": "prompts=...",
    "--set": "each setting by its name",
    "--allow-changes": "allow_changes=True",
    "--lora-merge": "lora_merge=True",
    "--eval-prompts": "eval_prompts=...",
    **{f"--{n}": f"{n}=..." for n in ("model", "lora", "preset", "prompts", "out", "device", "batch")},
    **{f"--{n}": f"{n}=..." for n in ("solver", "objective", "seed", "guidance", "resolution", "epochs")},
}


@contextmanager
def name_arguments() -> Iterator[None]:
    """Add to errors what the options that they name are in Python, where no command was given."""
    try:
        yield
    except NftError as error:
        text = str(error)
        options = dict.fromkeys(re.findall(r"--[a-z-]+", text))
        if said := [f"{option} is {IN_PYTHON[option]}" for option in options if option in IN_PYTHON]:
            error.args = (f"{text}{'' if text.endswith(('.', '?')) else '.'} In Python {', '.join(said)}.",)
        raise


MEMORY_FULL = (
    "The CPU's memory is full. Close other programs, or ask for less at once: rollout_batch, decode_batch and "
    "microbatch in a run, --batch in nft score, or a smaller model."
)


def is_memory_full(error: BaseException) -> bool:
    """Tell whether the CPU's memory was full; torch and safetensors have no error of their own for it."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


#: An error lists all names up to this many; among more nobody would find the nearest ones.
SHORT_LIST = 12


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "", lists: str = "") -> UsageError:
    """Make the error for a name that nobody has: it suggests the nearest three, and says which names there are.

    hint: a last sentence. lists: the command that lists all names, which is named where they are many.
    """
    known = sorted(known)
    if lists and len(known) > SHORT_LIST:
        there_are = f"`{lists}` lists them all."
    else:
        there_are = f"Known: {', '.join(known) or 'none'}."
    return UsageError(
        " ".join(filter(None, (f"Unknown {kind} {name!r}.", guess_name(name, known), there_are, hint)))
    )


def missing_part(owner: str, kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Make the error for a part, such as an option, that its owner does not have, with the nearest three names.

    kind: one or two nouns in the singular, such as "option".
    """
    known = sorted(known)
    there_are = f"It has {', '.join(known)}." if known else f"It has no {kind}."
    said = (f"{owner} has no {kind} {name!r}.", guess_name(name, known), there_are)
    return UsageError(" ".join(filter(None, said)))


def guess_name(name: str, known: Iterable[str]) -> str:
    """Guess which names a mistyped one may mean, as a question; "" where none is near."""
    near = [repr(n) for n in get_close_matches(name, known, n=3, cutoff=0.6)]
    return f"Did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}?" if near else ""


def describe_error(error: BaseException) -> str:
    """Describe an error by its class and its text."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # A plug-in's own error may be unable to say what it is.
        return type(error).__name__


#: What helps where the system refuses to write, by the error's number.
REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space of your quota, or have it raised",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENFILE: "Raise the limit on open files (ulimit -n)",
    errno.EROFS: "Make the file system writable",
    errno.EACCES: "Give yourself the right to write there",
    errno.EPERM: "Give yourself the right to write there",
    errno.ENOENT: "Put back the folder, which has been moved or deleted",
    errno.EIO: "See that the disk or the network is well",
    errno.ESTALE: "See that the disk or the network is well",
}


#: What the system says by these numbers, in plain words.
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota of the disk is used up"}


def read_error_number(error: BaseException) -> int:
    """Read the system's number from an error; 0 where it has none."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):  # as safetensors tells it
        number = int(said[1])
    return number or 0


def advise_on_disk(error: BaseException) -> str:
    """Say what helps where the system refuses to write, as the start of a sentence."""
    return REMEDIES.get(read_error_number(error), "Mend that")


def explain_full_disk(error: BaseException) -> str:
    """Explain that the disk is full, and what helps; returns "" for another error."""
    number = read_error_number(error)
    return f"{FULL[number]}. {REMEDIES[number]}." if number in FULL else ""


def say_uncreatable(folder: Path, error: OSError) -> NftError:
    """Make the error for a folder that the system would not make."""
    number = error.errno or 0
    # Where a folder is new, ENOENT does not mean that it was deleted.
    remedy = f"{REMEDIES[number]}, or choose" if number in REMEDIES and number != errno.ENOENT else "Choose"
    said = FULL.get(number) or error.strerror or error
    return NftError(f"The folder {folder} cannot be made: {said}. {remedy} another --out.")


#: Folders whose lines in a traceback are not those of a plug-in or a user.
OURS = {"nft_core", "nft_rewards", "nft_solvers", "nft_plugins", "importlib", "torch"}


def locate_error(error: BaseException) -> str:
    """Locate an error in the file of a plug-in or a user, as ` (FILE, line N)`; empty where there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    theirs = [f for f in frames if not OURS & set(Path(f.filename).parts)]
    if not theirs or isinstance(error, SyntaxError):  # which says so itself
        return ""
    # The plug-in's own file, at the last line that it reached: a library that it called may not be its
    # author's.
    last = [f for f in theirs if f.filename == theirs[0].filename][-1]
    return f" ({Path(last.filename).name}, line {last.lineno})"


def shorten_error(error: BaseException) -> str:
    """Shorten an error's text to one line of at most 400 letters."""
    text = " ".join(str(error).split())
    return text if len(text) < 400 else text[:400] + " ..."


def shorten_value(value: object) -> str:
    """Write a value as an error shows it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # An integer of thousands of digits, or tables nested as deep.
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
