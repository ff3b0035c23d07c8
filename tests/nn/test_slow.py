"""The slow twin follows as in five reference implementations."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sslcli.nn import slow


class Little(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["ema_0", "ema_0.9", "ema_0.999"])
def test_parameters_follow_and_buffers_stay(golden, name):
    case = np.load(golden / "ema" / f"{name}.npz")
    fast = Little().double()
    twin = slow.frozen_copy(fast)
    twin.load_state_dict({key: torch.from_numpy(case[f"in_target/{key}"]) for key in twin.state_dict()})
    for step in range(int(case["param_steps"])):
        seen = {key: torch.as_tensor(case[f"in_online_seq/{key}"][step]) for key in fast.state_dict()}
        fast.load_state_dict(seen)
        slow.ema_(twin, fast, float(case["param_m"]))
    for key, value in twin.state_dict().items():
        np.testing.assert_allclose(value.numpy(), case[f"out_target/{key}"], rtol=1e-9)


def test_a_frozen_copy_stands_alone():
    fast = Little()
    twin = slow.frozen_copy(fast)
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in fast.parameters())
    fast.fc.weight.data.add_(1)
    assert not torch.equal(twin.fc.weight, fast.fc.weight)
    slow.copy_(twin, fast)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), fast.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in twin.parameters())


def test_momentum_runs_from_base_to_end():
    assert slow.cosine_momentum(0.99, 1.0, 0.0) == pytest.approx(0.99)
    assert slow.cosine_momentum(0.99, 1.0, 0.5) == pytest.approx(0.995)
    assert slow.cosine_momentum(0.99, 1.0, 1.0) == 1.0
    # Grill et al. 2020: 1 - (1 - base) (cos(pi k / K) + 1) / 2
    assert slow.cosine_momentum(0.996, 1.0, 0.3) == pytest.approx(1 - 0.004 * (math.cos(0.3 * math.pi) + 1) / 2)
