"""The named choices of the objective. They stand apart so that settings can be read without importing torch."""

from typing import Literal

Std = Literal["global", "group"]
Combine = Literal["sum", "normalized"]
AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
TrainTimes = Literal["grid", "uniform", "logit_normal"]
