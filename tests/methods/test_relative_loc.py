import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from sslcli.backbones import resnet
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.methods import relative_loc

FACTS = RunFacts(images=8, batch_size=4, part_size=4, steps_per_epoch=2, total_steps=4)
AT = Progress(step=0, total=4, steps_per_epoch=2, seed=0)


def made(**settings) -> relative_loc.RelativeLoc:
    torch.manual_seed(0)
    backbone = resnet.build(resnet.Config(depth=10, width=8, stem="small"))
    return relative_loc.build(relative_loc.Config(hidden=16, **settings), backbone, FACTS)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["relative_loc_pairing_b1", "relative_loc_pairing_b2", "relative_loc_pairing_b3"])
def test_pairs(golden, name):
    case = np.load(golden / "pretext" / f"{name}.npz")
    features = torch.from_numpy(case["img"]).mean(dim=(3, 4), keepdim=True)  # (B, 8, 2C, 1, 1)
    neighbours, centres = features.chunk(2, dim=2)
    paired, labels = relative_loc.pairs(neighbours.unbind(1), centres[:, 0])
    np.testing.assert_array_equal(labels.numpy(), case["model_labels"])
    np.testing.assert_allclose(paired[::8].numpy(), case["neck_input"][::8], rtol=1e-12, atol=1e-12)
    for side in range(8):  # the recording gives each pair a centre of its own
        alone, _ = relative_loc.pairs([neighbours[:, side]], centres[:, side])
        np.testing.assert_allclose(alone.numpy(), case["neck_input"][side::8], rtol=1e-12, atol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["relative_loc_neck_a", "relative_loc_neck_b", "relative_loc_neck_c"])
def test_neck(golden, filled, name):
    case = np.load(golden / "pretext" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    neck = relative_loc.neck(2 * meta["in_channels"], meta["out_channels"], meta["bn_momentum"], dropout=0.0).double()
    ours = {"fc": "0", "bn": "1"}
    tensors = {key: torch.from_numpy(np.asarray(filled(key, shape))) for key, shape in meta["layout"].items()}
    neck.load_state_dict({f"{ours[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in tensors.items()})
    x = torch.from_numpy(case["x"]).mean(dim=(2, 3))
    np.testing.assert_allclose(neck.train()(x).detach().numpy(), case["out_train_no_dropout"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(neck[1].running_mean.numpy(), case["running_mean_after"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(neck[1].running_var.numpy(), case["running_var_after"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(neck.eval()(x).detach().numpy(), case["out_eval"], rtol=1e-12, atol=1e-12)


def test_one_pass_of_the_centre_equals_eight():
    generator = torch.Generator().manual_seed(1)
    views = list(torch.randn(9, 4, 3, 12, 12, generator=generator, dtype=torch.float64))
    once, often = made(dropout=0.0).double(), made(dropout=0.0).double()
    result = once(Batch(views=views, index=torch.arange(4)), AT)
    result.loss.backward()
    rows = torch.stack(views[:4] + views[5:], dim=1).flatten(0, 1)
    both = [often.backbone(rows), often.backbone(views[4].repeat_interleave(8, dim=0))]
    logits = often.head(often.neck(torch.cat(both, dim=1)))
    wanted = nn.functional.cross_entropy(logits, torch.arange(8).repeat(4))
    wanted.backward()
    torch.testing.assert_close(result.loss, wanted, rtol=1e-10, atol=1e-10)
    for (key, a), b in zip(once.named_parameters(), often.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_it_starts_as_published():
    method = made(dropout=0.0)
    assert method.neck[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert method.head.weight.std().item() == pytest.approx(0.005, rel=0.2)
    assert not method.neck[0].bias.any()
    assert not method.head.bias.any()
    loss = method(Batch(views=[torch.randn(4, 3, 12, 12) for _ in range(9)], index=torch.arange(4)), AT).loss
    assert loss.item() == pytest.approx(math.log(8), abs=0.05)


def test_sides_can_be_learned():
    method = made(dropout=0.0, momentum=0.1)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 30), indexing="ij")
    image = torch.stack([rows, columns, rows * columns]).expand(4, 3, 30, 30)
    views = [patch for row in image.chunk(3, dim=2) for patch in row.chunk(3, dim=3)]
    for _ in range(40):
        result = method(Batch(views=views, index=torch.arange(4)), AT)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert result.scalars["top1"] == 1
    assert result.loss < 1.2 < math.log(8)
