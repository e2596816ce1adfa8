"""Every setting of a run, in groups: a group is a table of a run file, and a heading of `nft settings`.

A setting's description is its help. The first sentence says what the setting does and must be understood alone,
as lists show nothing else. Then come the unit and what a higher value means.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..objective.choices import AdvantageMode, Combine, Std, TrainTimes
from ..objective.schedules import OLD_DECAY, LrSchedule

Attention = Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):
    """A group of settings. Its class's name in small letters is the table's, its docstring the heading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Where no other reason is given, defaults are those of the published runs with SD3.5 medium: `config/nft.py` of
# NVlabs/DiffusionNFT.


class Run(Group):
    """How long the run is, its random numbers, and who watches it."""

    preset: str = Field(
        "",
        description="Preset that the settings begin from; what else is given replaces its values. "
        "`nft presets` lists them. Empty begins from the defaults.",
    )
    epochs: CountOrZero = Field(
        100,
        description="Number of epochs, each a rollout and then gradient steps on its images. More epochs "
        "train longer. 0 only evaluates the base model.",
    )
    # Whole numbers of TOML end at 2^63.
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0,
        description="Seed of everything random in the run: prompts, noise and training times. The same seed "
        "and settings repeat a run.",
    )
    observers: list[str | dict[str, Any]] = Field(
        [],
        description="Observers to add to the run, each as NAME[,KEY=VALUE...], such as tensorboard or "
        "FILE.py:CLASS. `nft observers` lists them.",
    )


class Model(Group):
    """Which model is trained, and which of its weights."""

    model: str = Field(
        "stabilityai/stable-diffusion-3.5-medium",
        description="The model to train: the id of a diffusers pipeline on the Hugging Face hub, a local "
        "folder of one, a single file of weights, or a run or a checkpoint to begin from.",
    )
    lora: str = Field(
        "",
        description="A LoRA on top of the model, which training goes on from: a file, a folder, a run or a hub "
        "id. Empty takes the model as it is.",
    )
    lora_merge: bool = Field(
        False,
        description="Add the LoRA that training begins from to the model's weights, and train a new LoRA, or "
        "all weights, over the sum. false trains that LoRA further.",
    )
    family: str = Field(
        "",
        description="Name of the model's family, needed only where several plug-ins can handle its pipeline. "
        "Empty finds it from the pipeline; `nft models` lists families.",
    )
    model_options: dict[str, Any] = Field(
        {},
        description="Options of the model's family, by name, such as guidance=3.5 for FLUX.1 dev. "
        "docs/models.md names them.",
    )
    lora_rank: CountOrZero = Field(
        32,
        description="Rank of the LoRA that is trained. A higher rank can learn more and takes more memory. 0 "
        "trains all weights of the transformer.",
    )
    lora_alpha: Positive = Field(
        64,
        description="Strength of the LoRA, which is scaled by lora_alpha / lora_rank. A higher value makes "
        "the same weights change the model more.",
    )
    lora_targets: list[str] | Literal["all-linear"] = Field(
        [],
        description="Names of the linear layers that the LoRA adapts. Empty takes those that the model's "
        "family names; all-linear takes every linear layer of the transformer.",
    )


class Prompts(Group):
    """The prompts, and how they are encoded."""

    prompts: str = Field(
        "",
        description="File of the training prompts: .txt with one a line, .jsonl or .json. Empty takes prompts "
        "that come with nft-hub.",
    )
    eval_prompts: str = Field(
        "",
        description="File of held-out prompts, which are evaluated and never trained on: .txt, .jsonl or "
        ".json. Empty holds some of the training prompts out, or takes those that come with nft-hub.",
    )
    unscorable: Literal["error", "drop"] = Field(
        "error",
        description="What is done with prompts that a reward cannot score. error refuses the file; drop "
        "leaves them out and says how many.",
    )
    # The pipelines of SD3 and FLUX refuse more than 512; 0 is for models without such an encoder.
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] = Field(
        128,
        description="Most tokens of a prompt that the long text encoder reads; later ones are cut off. A "
        "higher value reads longer prompts and takes more memory and time.",
    )
    cache: str = Field(
        "",
        description="Folder that keeps encoded prompts, so that later runs need not encode them again. Empty "
        "keeps none.",
    )


class Rewards(Group):
    """What images are scored with, and how scores become advantages."""

    rewards: list[str | dict[str, Any]] = Field(
        [],
        description="Rewards that score the images, each as NAME[=WEIGHT][,KEY=VALUE...]. A higher weight "
        "makes a reward count more; weight 0 only measures it. `nft rewards` lists them.",
    )
    reward_defaults: dict[str, dict[str, Any]] = Field(
        {},
        description="Default options of rewards, by the reward's name. Options in `rewards` come before these.",
    )
    combine: Combine = Field(
        "sum",
        description="How several rewards become one advantage. sum normalises their weighted sum; normalized "
        "first normalises each reward, so that one with large numbers does not drown the others.",
    )
    std: Std = Field(
        "global",
        description="Standard deviation that advantages are divided by. global is that of the whole epoch; "
        "group is that of the images of each prompt, so that every prompt counts alike.",
    )
    advantage_clip: Positive = Field(
        5.0,
        description="Largest size of an advantage; larger ones are cut to plus or minus this. Advantages "
        "count in standard deviations. A higher value lets outliers count more and ordinary images less.",
    )
    advantage_mode: AdvantageMode = Field(
        "all",
        description="Which advantages count in nft and rft. all; positive_only and negative_only set the "
        "others to 0; one_only makes positive ones 1 and the rest 0; binary keeps only the sign.",
    )
    shuffle_rewards: bool = Field(
        False,
        description="Shuffle the scores within each prompt's images, as a control. A run with true should "
        "learn nothing; one that gets better shows that something else than the reward is at work.",
    )


class Rollout(Group):
    """How images are generated to learn from."""

    solver: str = Field(
        "dpm2",
        description="Solver that generates the images of rollouts, and those of evaluations unless eval_solver "
        "is given. `nft solvers` lists them.",
    )
    solver_options: dict[str, Any] = Field(
        {}, description="Options of the solver, by name. docs/solvers.md names them."
    )
    steps: Count = Field(
        10,
        description="Solver steps for each image of a rollout. More steps make better images and take "
        "proportionally longer.",
    )
    # One image has no other to be compared with, and so no advantage.
    group_size: Annotated[int, Field(ge=2)] = Field(
        24,
        description="Images generated for each prompt of an epoch, which are compared with one another. More "
        "images make advantages more exact and an epoch longer.",
    )
    prompts_per_epoch: Count = Field(
        48,
        description="Prompts that images are generated for in each epoch. More prompts make a gradient less "
        "noisy and an epoch longer.",
    )
    # Published runs have 512 px; `default_side` of `PipelineModel` takes large models down to that.
    resolution: CountOrZero = Field(
        0,
        description="Width and height of the images, in pixels. A higher value takes more memory and time. 0 "
        "takes the model's own.",
    )


class Loss(Group):
    """The loss, its KL term, and the old policy. docs/objectives.md has the formulas."""

    objective: str | dict[str, Any] = Field(
        "nft",
        description="What is minimised, as NAME[,KEY=VALUE...], such as awm or FILE.py:CLASS. nft is the "
        "DiffusionNFT loss; `nft objectives` lists them.",
    )
    # The published runs on OCR and on several rewards at once have 0.1.
    beta: Positive = Field(
        1.0,
        description="How strongly nft and rft mix the trained velocity with the old policy's: v+ = (1 - beta) "
        "v_old + beta v. A smaller value puts the optimum further from the old policy, by 2 / beta.",
    )
    kl_weight: NotNegative = Field(
        1e-4,
        description="Weight of the KL term, the squared distance between the velocities of the trained and "
        "the reference model. A higher value keeps the model closer to the reference. 0 leaves the term out, "
        "which saves a pass.",
    )
    reference: Literal["start", "base"] = Field(
        "start",
        description="Which model the KL term keeps the trained one near. start is what training began from, "
        "with its LoRAs and trained weights; base is the pipeline below all of these. They differ only for a "
        "run that begins from a checkpoint or a LoRA.",
    )
    kl_target: NotNegative = Field(
        0.0,
        description="KL that the weight of the KL term aims at: kl_weight grows in epochs whose KL is above "
        "it and shrinks again below it, never under its setting. A higher target lets the model move further "
        "from the base. 0 keeps kl_weight as it is.",
    )
    # The published run on OCR has `slow`.
    old_decay: float | str = Field(
        "ramp",
        description="How slowly the old policy, which generates the images, follows the trained one after "
        "each epoch. A number d is the share of the old weights that stays: higher is slower and more stable. "
        "on_policy is always 0; ramp grows by 0.001 a gradient step up to 0.5; slow is 0 for 75 steps and "
        "then grows by 0.0075 a step up to 0.999.",
        json_schema_extra={
            "anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"enum": [*OLD_DECAY]}]
        },
    )
    train_times: TrainTimes = Field(
        "grid",
        description="Which noise times an image is trained at. grid takes the solver's own times but the last "
        "before 0; uniform and logit_normal draw them at random.",
    )
    train_times_count: Count | Literal["auto"] = Field(
        "auto",
        description="Number of noise times that each image is trained at. More times take proportionally "
        "longer and make the gradient less noisy. auto follows steps: all of the solver's times but the last, "
        "as published, which are 9 for 10 steps.",
    )
    # SD3's own shift.
    time_shift: Positive = Field(
        3.0,
        description="Shift of times drawn by uniform and logit_normal. Above 1, more times lie near pure "
        "noise; 1 shifts nothing; grid does not use it.",
    )


class Optimizer(Group):
    """How gradients change the weights."""

    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="The optimizer. adamw8bit is AdamW with its moments in 8 bits, by bitsandbytes, which "
        "takes a quarter of their memory.",
    )
    lr: Positive = Field(
        3e-4,
        description="Learning rate of AdamW. A higher value learns faster, and above some point the run "
        "becomes unstable.",
    )
    lr_schedule: LrSchedule = Field(
        "constant",
        description="How the learning rate changes during the run. constant keeps it; cosine lowers it to 0 "
        "over the run's epochs; inverse_sqrt divides it by the square root of the gradient step, after warmup.",
    )
    warmup: CountOrZero = Field(
        0,
        description="Gradient steps in which the learning rate grows linearly up to lr. More steps begin more "
        "gently. 0 begins at lr.",
    )
    # The published run on OCR has 2, the others have 1.
    updates_per_epoch: Count = Field(
        1,
        description="Gradient steps in each epoch, among which the epoch's images are divided equally. More "
        "steps learn faster from the same images, each from fewer of them. Schedules that count gradient "
        "steps, such as old_decay, then go on faster too.",
    )
    adam_beta1: BelowOne = Field(
        0.9,
        description="AdamW's decay of the mean gradient per step. A higher value averages over more steps.",
    )
    adam_beta2: BelowOne = Field(
        0.999,
        description="AdamW's decay of the mean squared gradient per step. A higher value averages over more "
        "steps.",
    )
    weight_decay: NotNegative = Field(
        1e-4,
        description="AdamW's weight decay: each step shrinks the trained weights by lr times this share. A "
        "higher value pulls them more strongly to 0.",
    )
    max_grad_norm: Positive = Field(
        1.0,
        description="Largest norm of the gradient; a longer one is scaled down to it. A higher value clips "
        "less.",
    )
    ema_decay: BelowOne = Field(
        0.9,
        description="Decay per gradient step of the averaged weights (EMA) that are evaluated and saved. A "
        "higher value averages over more steps; at step n it is at most (1 + n) / (10 + n). 0 turns averaging "
        "off.",
    )


class Memory(Group):
    """Memory and speed: change these where a GPU's memory is full, or to go faster."""

    microbatch: Count = Field(
        8,
        description="Images in one training pass of a process. A higher value is faster and takes more "
        "memory; what is learned stays the same.",
    )
    rollout_batch: Count = Field(
        24,
        description="Images that a process generates at once. A higher value is faster and takes more memory; "
        "it is halved by itself where a GPU's memory is full.",
    )
    decode_batch: Count = Field(
        4,
        description="Images that a process decodes from latents at once. A higher value takes more memory and "
        "is hardly faster; it is halved by itself where a GPU's memory is full.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations a second time in the backward pass instead of keeping them. true "
        "takes much less memory and about a sixth more operations.",
    )
    offload: bool = Field(
        False,
        description="Keep the old, reference and EMA weights in the host's memory while they are not used. "
        "true takes less GPU memory and some time for copying.",
    )
    merge_lora: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether images are generated with the LoRA added into the base weights, which is faster. "
        "auto adds it only to float32 weights, where nothing is rounded away.",
    )
    precision: Precision = Field(
        "auto",
        description="Number format of matrix products and of frozen weights. auto is bf16 on CUDA and fp32 "
        "elsewhere; fp32 is the most exact and takes the most memory.",
    )
    decode_precision: Precision = Field(
        "auto",
        description="Number format of the VAE, which decodes latents to images. auto is bf16 on CUDA and fp32 "
        "elsewhere; fp32 is the most exact and takes the most memory.",
    )
    attention: Attention = Field(
        "auto",
        description="Attention kernel that is tried first. auto leaves the choice to torch; flash3 needs a "
        "package of its own.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Whether torch.compile makes the transformer's blocks faster. It takes one or two minutes "
        "at the start. auto compiles on CUDA where the run is long enough to gain by it.",
    )


class Parallel(Group):
    """Where the run computes: devices, and processes that share the work."""

    device: str = Field(
        "auto",
        description="Device to compute on: cpu, cuda, cuda:N or auto. auto is CUDA where there is a GPU.",
    )
    processes: Count | Literal["auto"] = Field(
        1,
        description="Processes on this machine that share the images of an epoch, one for each GPU. More "
        "processes are faster and learn the same. auto is one for each core of a CPU, at most 8, and one on a "
        "GPU.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="What several processes share. ddp: each has all weights, and gradients are averaged; "
        "fsdp: weights and optimizer moments are split among the processes, which takes less memory of each.",
    )
    join_timeout: Positive = Field(
        600,
        description="Seconds that the processes have to find one another at the start. A higher value waits "
        "longer for nodes that start late.",
    )
    # Two hours: a judge over a network may take long, and who comes too late ends the whole run.
    peer_timeout: Positive = Field(
        7200,
        description="Seconds that a process waits for another one during the run before it ends. It must be "
        "longer than the slowest scoring of one process; a higher value notices a dead node later.",
    )


class Evaluation(Group):
    """When and how the held-out prompts are evaluated."""

    eval_every: CountOrZero = Field(
        10,
        description="Epochs from one evaluation to the next. A higher value evaluates more rarely. 0 "
        "evaluates only before and after training.",
    )
    eval_images: Count = Field(
        1,
        description="Images generated for each held-out prompt in an evaluation. More images make its figures "
        "more exact and take proportionally longer.",
    )
    eval_steps: CountOrZero = Field(
        0,
        description="Solver steps for each image of an evaluation. More steps make better images and take "
        "longer. 0 takes as many as rollouts have.",
    )
    eval_solver: str = Field(
        "", description="Solver that generates the images of evaluations. Empty takes that of rollouts."
    )
    eval_solver_options: dict[str, Any] = Field(
        {}, description="Options of `eval_solver`, by name. They are not used where that is empty."
    )
    eval_guidance: NotNegative = Field(
        1.0,
        description="Strength of classifier-free guidance in evaluations, as published models are often used. "
        "A higher value follows the prompt more closely, and any other than 1 takes a second pass. 1 is "
        "without guidance, as in training.",
    )
    eval_resolution: CountOrZero = Field(
        0,
        description="Width and height of the images of evaluations, in pixels. 0 takes those of rollouts.",
    )


class Checkpoint(Group):
    """When checkpoints are saved, and which stay."""

    checkpoint_every: CountOrZero = Field(
        10,
        description="Epochs from one checkpoint to the next. A higher value saves more rarely, and more work "
        "is lost where a run is killed. 0 saves only at the end.",
    )
    keep_last: CountOrZero = Field(
        3,
        description="Number of newest checkpoints that stay on disk. A higher value takes more disk. 0 keeps "
        "all.",
    )
    keep_best: CountOrZero = Field(
        1,
        description="Number of checkpoints that stay beside the newest ones, the best by the total reward of "
        "their evaluation. A higher value takes more disk.",
    )


class Watch(Group):
    """What the run warns of, and when it gives up. A threshold of 0 turns its warning off."""

    strict: bool = Field(False, description="End the run at the first warning, after saving a checkpoint.")
    watch_x0: NotNegative = Field(
        1.5,
        description="Warn when the norm of the generated latents is more than this many times that of the "
        "first epoch. A higher value warns later.",
    )
    watch_gap: NotNegative = Field(
        0.5,
        description="Warn when the trained velocity differs from the old policy's by more than this share of "
        "its size. A higher value warns later.",
    )
    watch_flat_groups: NotNegative = Field(
        0.9,
        description="Warn when in more than this share of the prompts all images score the same, and so teach "
        "nothing. A higher value warns later.",
    )
    watch_spreads: NotNegative = Field(
        10.0,
        description="Warn when with combine=sum one reward varies more than this many times as much as another "
        "within the groups, so that the other hardly counts. A higher value warns later.",
    )
    watch_reward: NotNegative = Field(
        1.0,
        description="Warn when the held-out reward falls below the base model's by more than this many of the "
        "base model's standard deviations. A higher value warns later.",
    )
    max_nonfinite: Count = Field(
        5,
        description="End the run after this many gradient steps in a row that were left out as infinite or "
        "not a number. A higher value is more patient.",
    )
    max_skips: CountOrZero = Field(
        10,
        description="End the run after more than this many epochs in which a reward with on_error=skip was "
        "left out. A higher value is more patient.",
    )


#: The groups by the name of their table, in the order in which a reader looks for them.
GROUPS: dict[str, type[Group]] = {
    group.__name__.lower(): group
    for group in (
        *(Run, Model, Prompts, Rewards, Rollout, Loss),
        *(Optimizer, Memory, Parallel, Evaluation, Checkpoint, Watch),
    )
}
#: The group that each setting belongs to.
GROUP_OF = {name: group for group, declared in GROUPS.items() for name in declared.model_fields}
