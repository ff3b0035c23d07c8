"""InfoNCE equal to MoCo's own."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslcli.nn.contrast import info_nce, info_nce_logits, percent_right
from sslcli.nn.queue import Queue


@pytest.mark.golden
@pytest.mark.parametrize("name", ["infonce_T0.07_v1", "infonce_T0.2_v2", "infonce_T1_large_scale"])
def test_loss_gradient_and_queue(golden, name):
    case = np.load(golden / "moco" / f"{name}.npz")
    q = torch.from_numpy(case["in_q"]).requires_grad_()
    keys = F.normalize(torch.from_numpy(case["in_k"]), dim=1)
    queue = Queue(int(case["param_K"]), int(case["param_dim"])).double()
    queue.rows.copy_(torch.from_numpy(case["in_queue"].T))
    queue.pointer.fill_(int(case["in_queue_ptr"]))
    unit, temperature = F.normalize(q, dim=1), float(case["param_T"])
    found = info_nce(unit, keys, queue.rows.clone(), temperature)
    logits = info_nce_logits(unit, keys, queue.rows, temperature)
    np.testing.assert_allclose(logits.detach().numpy(), case["out_logits"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.loss.item(), case["out_loss"], rtol=1e-9)
    queue.push(keys)
    found.loss.backward()
    np.testing.assert_allclose(q.grad.numpy(), case["grad_q"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(queue.rows.numpy().T, case["out_queue_after"], rtol=1e-12)
    assert queue.pointer.item() == case["out_queue_ptr_after"]


def test_top1_counts_queries_that_find_their_key():
    q = torch.eye(3)
    keys = torch.stack([q[0], q[1], q[0]])  # the third query does not find its own
    found = info_nce(q, keys, q[2:], 0.1)
    assert found.top1.item() == pytest.approx(200 / 3)
    assert percent_right(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 0])) == 100


def test_stays_in_32_bits_under_autocast():
    q, keys, negatives = (F.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(q, keys, negatives, 0.07)
        half = info_nce(q.bfloat16(), keys.bfloat16(), negatives, 0.07)
    assert inside.loss.dtype == half.loss.dtype == torch.float32
    assert torch.equal(inside.loss, info_nce(q, keys, negatives, 0.07).loss)
