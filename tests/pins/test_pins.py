"""Figures that must not move: `pinned.py` says what they are of, and writes the golden files.

On another machine than the one that wrote a file, sums are taken in another order: figures then differ by
rounding, which training multiplies. The tolerances there are OTHER_MACHINE's.
"""

import json

import pinned
import pytest
import torch

#: Relative, by golden file. Between AVX-512 and kernels without it (ATEN_CPU_CAPABILITY=default,
#: ONEDNN_MAX_CPU_ISA=SSE41) scores moved by 1.1e-5 at most, losses by 2e-6, gradient norms by 7e-5, means and
#: deviations of rewards by 7e-4, and sums of the optimizer's moments by 1.2e-3 of their norm.
OTHER_MACHINE = {"settings": 0.0, "listings": 0.0, "plans": 0.0, "scores": 1e-4, "runs": 5e-3}

#: Compared on the machine that wrote them alone: between kernels their figures move by up to 5 %.
ROUNDED_BY_THE_CPU = {"lora, bf16"}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over several threads are taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(name, found, part=None):
    golden = json.loads(pinned.golden_path(name).read_text())
    expected = golden["figures"] if part is None else golden["figures"][part]
    same = golden["machine"] == pinned.fingerprint()
    if not same and part in ROUNDED_BY_THE_CPU:
        pytest.skip("what bfloat16 rounds away differs from CPU to CPU by more than a fault would")
    tolerance = pinned.SAME_MACHINE if same else OTHER_MACHINE[name]
    found = json.loads(json.dumps(found))
    different = list(pinned.differences(expected, found, tolerance))
    assert not different, (
        f"{len(different)} figures of {name}.json moved, on {'the same' if same else 'another'} machine:\n"
        + "\n".join(different[:20])
    )


@pytest.mark.parametrize("name", ["settings", "listings", "scores"])
def test_figures_have_not_moved(name):
    check(name, pinned.MAKERS[name]())


def cases(names, quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases(pinned.PLANS, {"tiny"}))
def test_a_plan_has_not_moved(name):
    check("plans", pinned.plan(name), name)


@pytest.mark.parametrize("name", cases(pinned.run_cases(), pinned.QUICK))
def test_a_run_has_not_moved(name):
    check("runs", pinned.run(name), name)


@pytest.mark.parametrize(("name", "names"), [("plans", pinned.PLANS), ("runs", pinned.run_cases())])
def test_every_golden_figure_is_looked_at(name, names):
    """What is no longer run, such as a solver that is no longer listed, would otherwise go unseen."""
    assert json.loads(pinned.golden_path(name).read_text())["figures"].keys() == names.keys()
