"""A run's settings: from presets, TOML files, `--set` and options, checked by pydantic."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import UsageError, unknown_name
from .objective.advantages import AdvantageMode, Combine, Std
from .objective.schedules import OLD_DECAY, LrSchedule
from .objective.train_times import TrainTimes

Attention = Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """All of a run. The names are the recipe's own; docs/settings.md explains each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # What is trained, and on what.
    model: str = Field("stabilityai/stable-diffusion-3.5-medium", description="hub id or local folder")
    model_options: dict[str, Any] = Field({}, description="options of the model's family, such as guidance=3.5")
    family: str = Field("", description="the model's family, where several handle its class; see `nft models`")
    rewards: list[str | dict[str, Any]] = Field([], description="reward specs: NAME[=WEIGHT][,KEY=VALUE...]")
    reward_defaults: dict[str, dict[str, Any]] = Field({}, description="default options by reward name")
    combine: Combine = Field("sum", description="normalise advantages of the sum, or of each reward")
    prompts: str = Field("", description="training prompts, .txt, .jsonl or .json")
    eval_prompts: str = Field("", description="held-out prompts, .txt, .jsonl or .json")
    unscorable: Literal["error", "drop"] = Field(
        "error", description="prompts that a reward cannot score: refuse the file, or leave them out"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of everything random in the run")
    epochs: Annotated[int, Field(ge=0)] = Field(100, description="rollouts followed by updates")

    # Rollout.
    solver: str = Field("dpm2", description="solver of rollouts and evaluation")
    solver_options: dict[str, Any] = Field({}, description="options of the solver")
    steps: Count = Field(10, description="solver steps of a rollout")
    group_size: Annotated[int, Field(ge=2)] = Field(24, description="images a prompt (K)")
    prompts_per_epoch: Count = Field(48, description="prompts an epoch")
    resolution: Annotated[int, Field(ge=0)] = Field(0, description="image side in px; 0: the model's")
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] = Field(
        128, description="tokens of a prompt that the long text encoder reads"
    )
    rollout_batch: Count = Field(
        24, description="images sampled at once, a process; halved where the device's memory is full"
    )
    decode_batch: Count = Field(4, description="images decoded at once, a process; halved likewise")
    merge_lora: Literal["auto", "always", "never"] = Field(
        "auto", description="sample with the LoRA added to the base; auto: where that is float32 and exact"
    )
    cache: str = Field("", description="folder that keeps encoded prompts for later runs; empty: none")

    # Advantages and loss.
    advantage_clip: Positive = Field(5.0, description="advantages are clipped to +- this")
    advantage_mode: AdvantageMode = Field("all", description="which advantages count")
    std: Std = Field("global", description="deviation that advantages are divided by")
    beta: Positive = Field(1.0, description="how far v+ and v- reach from the old policy")
    kl_weight: NotNegative = Field(1e-4, description="weight of |v_theta - v_ref|^2; 0 skips the reference")
    kl_target: NotNegative = Field(
        0.0, description="kl_weight grows while the KL is above this, never below its setting; 0: it stays"
    )
    old_decay: float | str = Field(
        "ramp", description="old <- d old + (1 - d) theta: a number, on_policy, ramp or slow"
    )
    train_times: TrainTimes = Field("grid", description="times that an image is trained at")
    train_times_count: Count = Field(9, description="how many of them")
    time_shift: Positive = Field(3.0, description="shift of uniform and logit_normal times")
    shuffle_rewards: bool = Field(
        False,
        description="a control: scores change places within their group, so nothing should be learned",
    )

    # Updates.
    updates_per_epoch: Count = Field(2, description="gradient steps an epoch")
    microbatch: Count = Field(8, description="images a forward pass of training, a process")
    lr: Positive = Field(3e-4, description="AdamW's learning rate")
    lr_schedule: LrSchedule = Field(
        "constant", description="constant; cosine: to 0 over the run; inverse_sqrt of the step, after warmup"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="gradient steps to reach lr, linearly")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="AdamW")
    weight_decay: NotNegative = Field(1e-4, description="AdamW")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="of the weights that are evaluated and saved, an update; 0: none"
    )
    lora_rank: Annotated[int, Field(ge=0)] = Field(32, description="0 trains the whole transformer")
    lora_alpha: Positive = Field(64, description="LoRA's scale is alpha / rank")
    lora_targets: list[str] | Literal["all-linear"] = Field(
        [], description="layers that LoRA adapts; empty: the family's; all-linear"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit: moments in 8 bits, by bitsandbytes"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations anew in the backward pass: less memory, more time"
    )
    offload: bool = Field(
        False, description="keep the old, reference and EMA weights in host memory between their uses"
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the transformer's blocks: one or two minutes at the start, faster from then "
        "on; auto: on CUDA, where the run is long enough to gain by it",
    )
    attention: Attention = Field(
        "auto",
        description="kernel of attention that is tried first: cudnn, flash, flash3 (a package of its own), "
        "efficient or math; auto: torch's own choice",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of matrix products and frozen weights; auto: bf16 on CUDA, else fp32"
    )
    decode_precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the VAE, which makes images of latents; auto: bf16 on CUDA, else fp32"
    )
    device: str = Field("auto", description="auto: CUDA where there is one")
    processes: Count | Literal["auto"] = Field(
        1, description="on this machine, one a GPU; auto: one a core on a CPU, 8 at most, and one on a GPU"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="what several processes share: ddp: gradients; fsdp: weights and their moments too"
    )

    # Evaluation and saving.
    eval_every: Annotated[int, Field(ge=0)] = Field(10, description="epochs; 0: before and after only")
    eval_images: Count = Field(1, description="images a held-out prompt")
    eval_steps: Annotated[int, Field(ge=0)] = Field(0, description="solver steps; 0: as in rollouts")
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(10, description="epochs; 0: at the end only")
    keep_last: Annotated[int, Field(ge=0)] = Field(3, description="newest checkpoints that are kept; 0: all")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        1, description="checkpoints kept beside these, best by the total reward of their evaluation"
    )
    observers: list[str | dict[str, Any]] = Field(
        [], description="observers to add: NAME[,KEY=VALUE...], such as tensorboard"
    )

    # Watching: thresholds of warnings, 0: none; and limits.
    strict: bool = Field(False, description="end the run at the first warning")
    watch_x0: NotNegative = Field(1.5, description="latents' norm, times the first epoch's")
    watch_gap: NotNegative = Field(0.5, description="live policy's distance from the old one, of its velocity")
    watch_flat_groups: NotNegative = Field(0.9, description="share of groups whose images all score the same")
    watch_reward: NotNegative = Field(
        1.0, description="fall of the held-out reward, in deviations of the base model's"
    )
    max_nonfinite: Count = Field(5, description="gradient steps in a row that may be left out as not finite")
    max_skips: Annotated[int, Field(ge=0)] = Field(
        10, description="epochs in which a reward with on_error=skip may be left out"
    )
    join_timeout: Positive = Field(600, description="seconds that all processes have to come together")
    peer_timeout: Positive = Field(7200, description="seconds that a process waits for another")

    @field_validator("rewards", "reward_defaults", "observers", "solver_options", "model_options")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        """TOML knows inf and nan; a checkpoint's JSON does not."""
        rest = [value]
        while rest:
            one = rest.pop()
            if isinstance(one, float) and not isfinite(one):
                raise ValueError(
                    "expected finite numbers; an option may also be given as text, as NAME,KEY=inf"
                )
            rest += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
        return value

    @field_validator("old_decay")
    @classmethod
    def _known_schedule(cls, value: float | str) -> float | str:
        if isinstance(value, str) and value not in OLD_DECAY:
            raise ValueError(f"expected a number in [0, 1) or one of {', '.join(OLD_DECAY)}")
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("expected a number in [0, 1): at 1 the old policy would never move")
        return value

    @model_validator(mode="after")
    def _kl_is_measured(self) -> Settings:
        if self.kl_target and not self.kl_weight:
            raise ValueError("kl_target raises kl_weight, and 0 stays 0: give a kl_weight, or set kl_target=0")
        return self

    @model_validator(mode="after")
    def _moments_can_be_shared(self) -> Settings:
        if self.parallel == "fsdp" and self.optimizer == "adamw8bit" and not self.lora_rank:
            raise ValueError(
                "bitsandbytes cannot train weights that processes share: with parallel=fsdp and lora_rank=0 "
                "use optimizer=adamw, whose moments are shared too"
            )
        return self

    @model_validator(mode="after")
    def _possible_sizes(self) -> Settings:
        images = self.prompts_per_epoch * self.group_size
        if images % self.updates_per_epoch:
            raise ValueError(
                f"prompts_per_epoch x group_size = {self.prompts_per_epoch} x {self.group_size} = {images} "
                f"images cannot be split into {self.updates_per_epoch} equal updates; the nearest possible "
                f"updates_per_epoch is {nearest_divisor(images, self.updates_per_epoch)}"
            )
        return self


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller of two; 1 where none is near."""
    wanted = min(wanted, number)
    # A bound, since nobody waits for the divisors of a mistyped 10^18.
    for distance in range(min(wanted, 100_000)):
        for n in (wanted - distance, wanted + distance):
            if number % n == 0:
                return n
    return 1


def make_settings(*layers: Mapping[str, Any]) -> Settings:
    """Settings from mappings, later ones first in rank; the defaults of different rewards are put together.

    Raises UsageError with every mistake on one line.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in Settings.model_fields:
                raise unknown_name("setting", name, Settings.model_fields)
            before = merged.get(name)
            if name == "reward_defaults" and isinstance(value, Mapping) and isinstance(before, Mapping):
                value = {**before, **value}
            if isinstance(value, int) and abs(value) >= 2**63:  # More than a run file and torch can hold.
                raise UsageError(f"Setting {name} = {shown(value)}: a whole number must be below 2^63.")
            merged[name] = value
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(e) for e in error.errors())) from error


#: pydantic names which part of a union has refused a value.
UNION_PART = re.compile(r"float|str|int|constrained-\w+|(literal|dict|list)\[.*")


def _explain(error: Any) -> str:
    name = ".".join(part for part in map(str, error["loc"]) if not UNION_PART.fullmatch(part))
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    return f"Setting {name} = {shown(error['input'])}: {message[0].lower() + message[1:]}."


def shown(value: Any) -> str:
    """A value as an error shows it: cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # An integer of thousands of digits, or tables nested as deep.
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


#: Beside a TOMLDecodeError, which is a ValueError too, those of integers too long and of tables too deep.
TOML_ERRORS = (ValueError, RecursionError)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a run file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no file can have.
        raise UsageError(f"Cannot read the run file {path}: {error}.") from error
    try:
        return tomllib.loads(text)
    except TOML_ERRORS as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` of `--set`; the value as TOML writes it, or else a plain string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set takes KEY=VALUE, such as --set lr=1e-4, got {text!r}.")
    try:
        table = tomllib.loads(f"value = {value}")
    except TOML_ERRORS:
        table = {}
    # A value with a line break in it could bring other names with it.
    return name.strip(), table["value"] if table.keys() == {"value"} else value.strip()


def to_toml(settings: Settings) -> str:
    """A run file that reads back as these settings. Raises UsageError for an option that is None."""
    try:
        return tomli_w.dumps(settings.model_dump(mode="json"))
    except (TypeError, ValueError) as error:  # ValueError: an integer of thousands of digits.
        raise UsageError(
            "A run file holds text, numbers, true, false, lists and tables; one of the options of this run "
            f"is something else (for None write none): {error}."
        ) from error
