"""SwanLab: `nft run --observer swanlab`, then `swanlab sync`; `mode=online` sends to an account at once."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

from nft_plugins import Run

from ...errors import Stopped
from .dashboards import Changes, Dashboard, add_captions, recall
from .samples import Sample


class SwanLab(Dashboard):
    """Logs figures by epoch, the pictures of evaluations, the settings and a summary.

    project, workspace: where on the server. name: of the run there; by default its folder's.
    mode: `offline`, which writes to `RUN/swanlab` for `swanlab sync`; `local`, there too, for `swanlab watch`,
        which needs `pip install "swanlab[dashboard]"`; or `online`. By default SWANLAB_MODE's, or offline.
    """

    def __init__(
        self,
        *,
        project: str = "nft-hub",
        workspace: str | None = None,
        name: str | None = None,
        mode: Literal["offline", "local", "online"] | None = None,
    ) -> None:
        import swanlab

        self.swanlab: Any = swanlab
        self.log: Any = None
        self.project, self.workspace, self.name = project, workspace, name
        self.mode = mode or os.environ.get("SWANLAB_MODE") or "offline"

    def begin(self, run: Run) -> None:
        # A run that goes on is the same one there.
        known, _ = recall(run.folder / "swanlab-id.txt", secrets.token_hex(4))
        settings = self.swanlab.Settings(
            interactive=False,  # Without an account it says so, and does not wait for somebody to type.
            terminal={"proxy_type": "none"},  # The console is a display that moves, and no log.
        )
        with keep_interrupt(), redirect_stdout(sys.stderr):
            self.log = self.swanlab.init(
                project=self.project,
                workspace=self.workspace,
                mode=self.mode,
                id=known,
                resume="allow",
                name=self.name or run.folder.name,
                log_dir=str(run.folder / "swanlab"),
                config=dict(self.settings),
                settings=settings,
            )

    def log_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        self.log.log(dict(figures), step=epoch)

    def log_pictures(self, epoch: int, name: str, rows: Sequence[Sequence[Sample]]) -> None:
        pictures = [self.swanlab.Image(p.image, caption=p.caption) for p in add_captions(rows)]
        self.log.log({name: pictures}, step=epoch)

    def log_summary(self, epoch: int, changes: Changes) -> None:
        self.log.log({"summary": self.swanlab.Text(changes.table)}, step=epoch)

    def end(self, error: BaseException | None) -> None:
        stopped = isinstance(error, KeyboardInterrupt | Stopped)
        state = "success" if error is None else "aborted" if stopped else "crashed"
        with keep_interrupt(), redirect_stdout(sys.stderr):
            self.log.finish(state=state, error=None if error is None else f"{type(error).__name__}: {error}")


@contextmanager
def keep_interrupt() -> Iterator[None]:
    """Keep what Ctrl-C does: SwanLab would end its run at once, and this one saves first."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
