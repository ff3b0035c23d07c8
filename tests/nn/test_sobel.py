"""Slopes equal to those of DeepCluster's and MMSelfSup's first layer."""

import numpy as np
import pytest
import torch

from sslcli.backbones import resnet
from sslcli.nn.sobel import Sobel

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("name", ["sobel_rand", "sobel_impulse", "sobel_china24"])
def test_equals_the_recordings(golden, name):
    case = np.load(golden / "sobel" / f"{name}.npz")
    x = torch.from_numpy(case["x"])
    np.testing.assert_allclose(Sobel().double()(x.double()).numpy(), case["out_f64"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(Sobel()(x.float()).numpy(), case["out_f32"], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["sobel_7x9", "sobel_1x1"])
def test_gradients_equal_the_recordings(golden, name):
    case = np.load(golden / "sobel" / f"{name}.npz")
    x = torch.from_numpy(case["in_x"]).requires_grad_()
    y = Sobel()(x)
    (y * torch.from_numpy(case["in_cotangent"])).sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), case["out_y"], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(x.grad.numpy(), case["grad_x"], rtol=1e-5, atol=1e-5)


def test_a_resnet_behind_it_sees_no_colour():
    torch.manual_seed(0)
    net = resnet.build(resnet.Config(depth=10, width=8, stem="small", sobel=True)).eval()
    assert net.trunk.conv1.weight.shape[1] == 2
    assert not [key for key in net.state_dict() if not key.startswith("trunk.")]
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(net(x), net(x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)))
    torch.testing.assert_close(net.taps(x, ["pooled"])["pooled"], net(x))
