"""Projection heads equal to MMSelfSup's necks."""

import numpy as np
import pytest
import torch
from torch import nn

from sslcli.nn.heads import mlp

CASES = {
    "linear": mlp([9, 6]),
    "mocov2": mlp([9, 8, 6]),
    "nonlinear_simclr": mlp([9, 8, 6], norm=True, bias=False, last_norm=True, last_bias=False),
    "nonlinear_simclr_eval": mlp([9, 8, 6], norm=True, bias=False, last_norm=True, last_bias=False),
    "nonlinear_byol": mlp([9, 8, 6], norm=True, last_bias=False),
    "nonlinear_barlow3": mlp([9, 8, 8, 7], norm=True, bias=False, last_bias=False),
    "nonlinear_simsiam3": mlp([9, 8, 8, 6], norm=True, bias=False, last_norm=True, last_affine=False, last_bias=False),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(golden, name):
    case = np.load(golden / "necks" / f"{name}.npz")
    head = CASES[name].double().train("eval" not in name)
    state = {key.removeprefix("state/"): torch.from_numpy(case[key]) for key in case if key.startswith("state/")}
    learned = {key: value for key, value in state.items() if key.endswith(("weight", "bias"))}
    for (own, parameter), (theirs, value) in zip(head.named_parameters(), learned.items(), strict=True):
        assert own.rpartition(".")[2] == theirs.rpartition(".")[2]
        parameter.data.copy_(value)
    tracked = [value for key, value in state.items() if "running" in key or "tracked" in key]
    for buffer, value in zip(head.buffers(), tracked, strict=False):
        buffer.copy_(value)

    x = torch.from_numpy(case["in_x0"]).requires_grad_()
    y = head(x.mean(dim=(2, 3)))
    (y * torch.from_numpy(case["in_cotangent0"])).sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), case["out_y0"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), case["grad_x0"], rtol=1e-9, atol=1e-9)
    for parameter, theirs in zip(head.parameters(), learned, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), case[f"gradparam/{theirs}"], rtol=1e-9, atol=1e-9)
    after = [case[key] for key in case if key.startswith("after/")]
    for buffer, value in zip(head.buffers(), after, strict=bool(after)):
        np.testing.assert_allclose(buffer.numpy(), value, rtol=1e-9)


def test_a_single_width_pair_is_one_linear_layer():
    head = mlp([5, 3])
    assert [type(layer) for layer in head] == [nn.Linear]
    assert head[0].bias is not None
