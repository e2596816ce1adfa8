"""Trackio: `nft run --observer trackio`, then `trackio show --project nft-hub`."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from nft_plugins import Run

from ...errors import NftError
from .dashboards import Changes, Dashboard, add_captions, recall, replace_attribute
from .samples import Sample


class Trackio(Dashboard):
    """Logs figures by epoch, the pictures of evaluations, the settings and a summary, on this machine.

    project: that it shows together. name: of the run there; by default its folder's, and four digits.
    space: a Space of Hugging Face's to send it to, as `USER/NAME`; by default TRACKIO_SPACE_ID's, or none.
    server: the address of a Trackio server of yours; by default TRACKIO_SERVER_URL's, or none.
    private: whether a Space that is made for it is one that only you see.
    """

    def __init__(
        self,
        *,
        project: str = "nft-hub",
        name: str | None = None,
        space: str | None = None,
        server: str | None = None,
        private: bool = True,
    ) -> None:
        import trackio

        self.trackio: Any = trackio
        self.log: Any = None
        self.project, self.name, self.private = project, name, private
        self.space = space or os.environ.get("TRACKIO_SPACE_ID")
        self.server = server or os.environ.get("TRACKIO_SERVER_URL")

    def begin(self, run: Run) -> None:
        # Trackio finds the run that goes on by its name, so that no other run may have it.
        new = self.name or f"{run.folder.name}-{secrets.token_hex(2)}"
        name, known = recall(run.folder / "trackio-name.txt", new)
        with self.guard_network(), redirect_stdout(sys.stderr):
            self.log = self.trackio.init(
                project=self.project,
                name=name,
                space_id=self.space,
                server_url=self.server,
                private=self.private,
                config=dict(self.settings),
                resume="allow" if known else "never",
                embed=False,
            )

    @contextmanager
    def guard_network(self) -> Iterator[None]:
        """Keep Trackio from asking for a password, and where all stays on this machine from asking the hub.

        With a token it would ask huggingface.co for the user's name.
        """
        import huggingface_hub
        from huggingface_hub import constants

        if not self.space:
            # A server of the user's own is no matter of huggingface_hub's.
            with replace_attribute(constants, "HF_HUB_OFFLINE", True):
                yield
            return
        advice = f"sending to the Space {self.space} needs a token that may write: `hf auth login`, or HF_TOKEN"
        if not huggingface_hub.get_token():
            raise NftError(f"The observer trackio cannot start: {advice}.")

        def refuse(*given: Any, **options: Any) -> None:
            raise PermissionError(advice)

        with replace_attribute(huggingface_hub, "login", refuse):
            yield

    def log_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        self.log.log(dict(figures), step=epoch)

    def log_pictures(self, epoch: int, name: str, rows: Sequence[Sequence[Sample]]) -> None:
        # It has no list of pictures, but a table of them.
        captioned = [[self.trackio.Image(p.image, caption=p.caption), p.caption] for p in add_captions(rows)]
        self.log.log({name: self.trackio.Table(columns=["picture", "prompt"], data=captioned)}, step=epoch)

    def log_summary(self, epoch: int, changes: Changes) -> None:
        self.log.log({"summary": self.trackio.Markdown(changes.table)}, step=epoch)

    def end(self, error: BaseException | None) -> None:
        with redirect_stdout(sys.stderr):
            # And not `self.log.finish`, after which Trackio would end the run once more when Python ends.
            self.trackio.finish()
