"""Weights & Biases: `nft run --observer wandb,project=NAME`; `mode=offline` needs no account."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nft_plugins import Run

from .dashboards import Changes, Dashboard, add_captions, recall
from .samples import Sample


class WandB(Dashboard):
    """Logs figures by epoch, the pictures of evaluations, the settings and a summary.

    project, entity: where on the server. name: of the run there; by default its folder's.
    mode: `online`, or `offline`, which writes to `RUN/wandb` for `wandb sync`; by default WANDB_MODE's.
    """

    def __init__(
        self,
        *,
        project: str = "nft-hub",
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline"] | None = None,
    ) -> None:
        import wandb

        self.wandb = wandb
        self.log: Any = None
        self.project, self.entity, self.name, self.mode = project, entity, name, mode

    def begin(self, run: Run) -> None:
        # A run that goes on is the same one there.
        known, _ = recall(run.folder / "wandb-id.txt", secrets.token_hex(4))
        self.log = self.wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            id=known,
            resume="allow",
            name=self.name or run.folder.name,
            dir=str(run.folder),
            config=dict(self.settings),
        )
        # By epoch, since its own count goes up with every call.
        self.log.define_metric("*", step_metric="epoch")

    def log_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        self.log.log({**figures, "epoch": epoch})

    def log_pictures(self, epoch: int, name: str, rows: Sequence[Sequence[Sample]]) -> None:
        pictures = [self.wandb.Image(p.image, caption=p.caption) for p in add_captions(rows)]
        self.log.log({name: pictures, "epoch": epoch})

    def log_summary(self, epoch: int, changes: Changes) -> None:
        for name, summary in changes.figures.items():
            figures = {"start": summary.start.mean, "end": summary.end.mean}
            if summary.change:
                figures["change"] = summary.change.mean
            self.log.summary.update({f"summary/{name}/{n}": v for n, v in figures.items()})

    def end(self, error: BaseException | None) -> None:
        self.log.finish(exit_code=1 if error else 0)
