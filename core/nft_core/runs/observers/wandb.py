"""Weights & Biases: `nft run --observer wandb,project=NAME`; `mode=offline` needs no account."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal

from nft_plugins import Batch, Run, Scores, hookimpl

from .metrics import flatten_numbers
from .samples import choose_samples


class WandB:
    """Logs figures by epoch, the pictures of evaluations and the settings.

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

    @hookimpl
    def nft_run_started(self, run: Run) -> None:
        # A run that goes on is the same one there.
        note = run.folder / "wandb-id.txt"
        known = note.read_text(encoding="utf-8").strip() if note.exists() else secrets.token_hex(4)
        note.write_text(known + "\n", encoding="utf-8")
        self.log = self.wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            id=known,
            resume="allow",
            name=self.name or run.folder.name,
            dir=str(run.folder),
            config=dict(run.settings),
        )
        # By epoch, since its own count goes up with every call.
        self.log.define_metric("*", step_metric="epoch")

    @hookimpl
    def nft_epoch_finished(self, record: Mapping[str, Any]) -> None:
        self._write("train", record)

    @hookimpl
    def nft_eval_finished(self, record: Mapping[str, Any], batch: Batch, scores: Scores) -> None:
        pictures = [
            self.wandb.Image(s.image, caption="\n".join([s.prompt, *(score.text for score in s.scores)]))
            for s in choose_samples(record, batch, scores)
        ]
        self._write("eval", record, samples=pictures)

    @hookimpl
    def nft_run_finished(self, error: BaseException | None) -> None:
        if self.log:
            self.log.finish(exit_code=1 if error else 0)

    def _write(self, kind: str, record: Mapping[str, Any], **more: Any) -> None:
        figures = {f"{kind}/{name}": value for name, value in {**flatten_numbers(record), **more}.items()}
        self.log.log({**figures, "epoch": record["epoch"]})
