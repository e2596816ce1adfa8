"""Names the choices of the objective. They have a file of their own since settings are read without torch."""

from typing import Literal

Std = Literal["global", "group"]
Combine = Literal["sum", "normalized"]
AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
TrainTimes = Literal["grid", "uniform", "logit_normal"]
