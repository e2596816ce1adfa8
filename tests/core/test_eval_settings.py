"""Settings of evaluations take the place of those of rollouts, and nothing else changes."""

from nft_core.runs.observers.console import describe_evaluation
from nft_core.settings import for_evaluation, make_settings


def test_evaluations_are_like_rollouts_unless_told_otherwise():
    settings = make_settings({"steps": 10, "solver": "dpm2", "resolution": 512})
    assert for_evaluation(settings) == settings
    assert describe_evaluation(settings.model_dump()) == ""


def test_settings_of_evaluations_take_the_place_of_those_of_rollouts():
    settings = make_settings(
        {
            **{"steps": 10, "eval_steps": 40, "solver": "sde", "solver_options": {"noise": 0.5}},
            **{"eval_solver": "euler", "eval_resolution": 768, "eval_guidance": 4.5},
        }
    )
    its = for_evaluation(settings)
    assert (its.steps, its.solver, its.solver_options, its.resolution) == (40, "euler", {}, 768)
    said = describe_evaluation(settings.model_dump())
    assert said == (
        "40 steps instead of 10, 768 pixels instead of the model's own, solver euler instead of sde, "
        "guidance 4.5 instead of none"
    )
