"""Learning-rate schedules, compared with torch's schedulers."""

import pytest
import torch

from clip_finetune.engine.train.schedules import SCHEDULES, START, one_cycle


def torchs_rates(build, total):
    """The learning rates of a torch scheduler over `total` steps."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.8, 0.9))
    scheduler, rates = build(optimizer), []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize("total, warmup, min_ratio", [(20, 0.3, 0.01), (100, 0.1, 0.001), (333, 0.5, 0.02)])
def test_one_cycle_equals_torchs(total, warmup, min_ratio):
    theirs = torchs_rates(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=total,
            pct_start=warmup,
            div_factor=25,
            final_div_factor=1 / (25 * min_ratio),
            cycle_momentum=False,
        ),
        total,
    )
    assert [one_cycle(step, total, warmup, min_ratio) for step in range(total)] == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, rising, min_ratio", [(20, 5, 0.01), (101, 10, 0.1), (50, 0, 0.0)])
def test_the_other_schedules_equal_torchs(name, total, rising, min_ratio):
    from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

    rest = total - 1 - rising
    fall = {
        "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=rest, eta_min=min_ratio),
        "linear": lambda optimizer: LinearLR(optimizer, 1.0, min_ratio, total_iters=rest),
        "constant": lambda optimizer: ConstantLR(optimizer, 1.0, total_iters=rest),
    }[name]

    def build(optimizer):
        if not rising:
            return fall(optimizer)
        rise = LinearLR(optimizer, START, 1.0, total_iters=rising)
        return SequentialLR(optimizer, [rise, fall(optimizer)], [rising])

    ours = [SCHEDULES[name].multiple(step, total, rising / total, min_ratio) for step in range(total)]
    assert ours == pytest.approx(torchs_rates(build, total), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("total", [1, 2, 3, 5, 10, 1000])
def test_a_schedule_ends_at_its_minimum_and_never_rises_above_the_peak(name, total):
    multiples = [SCHEDULES[name].multiple(step, total, 0.1, 0.01) for step in range(total)]
    assert max(multiples) <= 1 and min(multiples) > 0
    if name != "constant" and total > 1:
        assert multiples[-1] == pytest.approx(0.01)
    if name == "one_cycle" and total > 1:
        assert multiples[0] == pytest.approx(1 / 25)
    if total > 2:
        assert max(multiples) > 0.5
