"""What `run.toml` tells of how a run was made, in its table `[record]`: versions, commands, dates."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import environment

if TYPE_CHECKING:
    from ..host.host import Host

#: The variable that tells the processes of a run the command of the one that started them.
COMMAND = "NFT_COMMAND"
#: Starts after the first that are kept, the latest ones.
MOST_STARTS = 50
HIDDEN = "***"
#: A part of a name that says that the value is a secret, as in `api_key` and `HF_TOKEN`.
SECRET_WORDS = r"(?:token|key|apikey|secret|password|passwd|passphrase|credentials?|auth|authorization|bearer)"
#: NAME=VALUE and "NAME": VALUE where the name has such a part.
SECRET_OPTION = re.compile(
    rf"(?i)((?<![a-z0-9])(?:[\w.]*[-_.])?{SECRET_WORDS}[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;}}\]]+)"
)
SECRET_NAME = re.compile(rf"(?i)(?:^|.*[-_]){SECRET_WORDS}")
#: Keys as services write them: Hugging Face, OpenAI and its like, GitHub, AWS, JSON web tokens.
SECRET_VALUE = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|AKIA\w{12,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"
)
#: The name and password of an address.
SECRET_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def describe_start(host: Host) -> dict[str, Any]:
    """Describe what starts a run here and now, as TOML can hold it."""
    from .fingerprint import collect_sources

    commit = find_commit(Path.cwd())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": (environment.is_started_by_launcher() and os.environ.get(COMMAND)) or describe_command(),
        **({"commit": commit} if commit else {}),
        "versions": {"python": platform.python_version(), **collect_sources(host)},
    }


def add_start(record: Mapping[str, Any], start: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Add a start to a run's record: the first is the record itself, others stand in `resumed`.

    Versions that are as at the first start are left out of a later one.
    """
    if "command" not in record:
        return {**record, **start}
    first = record.get("versions")
    known = first if isinstance(first, Mapping) else {}
    other = {name: value for name, value in start["versions"].items() if known.get(name) != value}
    later = {k: v for k, v in start.items() if k != "versions"} | ({"versions": other} if other else {})
    before = record.get("resumed")
    starts = [*(before if isinstance(before, list) else []), {"step": step, **later}]
    return {**record, "resumed": starts[-MOST_STARTS:]}


def describe_command() -> str:
    """Write the command of this process as one types it, with `***` for what may be secret."""
    program, *words = sys.argv or [""]
    name = "nft" if Path(program).name in ("nft", "__main__.py") else Path(program).name
    return hide_secrets([name, *words], os.environ)


def hide_secrets(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """Join a command's words, with `***` for values of secret options and variables, and for keys."""
    secrets = list_secrets(environment)
    kept, before = [], ""
    for word in words:
        # `--api-key VALUE`: the value is the next word.
        follows = before.startswith("--") and "=" not in before and SECRET_NAME.fullmatch(before[2:])
        kept.append(HIDDEN if follows else hide_in_text(word, secrets))
        before = word
    # A name may hold bytes that are no text.
    return shlex.join(kept).encode("utf-8", "backslashreplace").decode()


def list_secrets(environment: Mapping[str, str]) -> list[str]:
    """List the values of variables whose names say that they are secret."""
    found = {v for name, v in environment.items() if SECRET_NAME.fullmatch(name) and len(v) >= 6}
    # The longest first: a short secret may be a part of a longer one.
    return sorted(found, key=len, reverse=True)


def hide_in_text(text: str, secrets: Sequence[str]) -> str:
    """Write `***` in a text for given secrets, for values of secret options, and for keys."""
    for value in secrets:
        text = text.replace(value, HIDDEN)
    text = SECRET_OPTION.sub(rf"\g<1>{HIDDEN}", text)
    return SECRET_ADDRESS.sub(HIDDEN, SECRET_VALUE.sub(HIDDEN, text))


def hide_in_settings(value: Any, secrets: Sequence[str]) -> Any:
    """Copy settings, with `***` for what may be secret in their texts."""
    if isinstance(value, str):
        return hide_in_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if isinstance(v, str) and SECRET_NAME.fullmatch(name) else hide_in_settings(v, secrets)
            for name, v in value.items()
        }
    return [hide_in_settings(v, secrets) for v in value] if isinstance(value, list | tuple) else value


def find_commit(folder: Path) -> str:
    """Find a folder's git commit, with `-dirty` behind it where files have changed since; empty without one."""
    # A folder's own settings could name a program that git would start.
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"],
            cwd=folder,
            # git would otherwise refresh its index and hold a lock, in a folder where others may work.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    found = done.stdout.strip()
    return found if done.returncode == 0 and re.fullmatch(r"[0-9a-f]{40,64}(-dirty)?", found) else ""
