"""ODC: the neck is OpenMMLab's, labels are those in memory, and shares change nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli import dist
from sslcli.backbones import resnet
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.errors import UserError
from sslcli.methods import odc
from sslcli.nn.norm import group_batch_norm

IMAGES = 60


def facts(images: int = IMAGES) -> RunFacts:
    return RunFacts(images=images, batch_size=8, part_size=8, steps_per_epoch=10, total_steps=30)


def build(**settings: object) -> odc.ODC:
    torch.manual_seed(0)
    small = {"hidden": 16, "dim": 8, "clusters": 5, "min_cluster": 3, "centroids_every": 2, "dropout": 0.0}
    backbone = resnet.build(resnet.Config(depth=10, width=8, stem="small"))
    method = odc.build(odc.Config(**(small | settings)), backbone, facts())
    group_batch_norm(method, local=8 // dist.world(), group="global")
    return method.double()


def at(step: int) -> Progress:
    return Progress(step=step, total=30, steps_per_epoch=10, seed=1)


def pictures(count: int = IMAGES, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(method: odc.ODC) -> odc.ODC:
    share = dist.share(IMAGES)

    def look(features):
        method.eval()
        with torch.no_grad():
            rows = features(pictures()[share.start : share.stop])
        method.train()
        return rows

    method.before_epoch(at(0), look)
    return method


@pytest.mark.golden
def test_the_neck_is_openmmlabs(golden):
    case = {key: torch.from_numpy(value) for key, value in np.load(golden / "odc" / "odc_eval.npz").items()
            if key not in ("meta", "param_shape")}  # fmt: skip
    neck = odc.neck(9, 8, 6, 0.5).double().eval()
    names = {"fc0": neck[0], "bn0": neck[1], "fc1": neck[4]}
    for name, layer in names.items():
        layer.load_state_dict({k.split(".")[1]: v for k, v in case.items() if k.startswith(f"state/{name}.")})
    x = case["in_x0"].requires_grad_()
    y = neck(x.mean(dim=(2, 3)))
    (y * case["in_cotangent0"]).sum().backward()
    torch.testing.assert_close(y.detach(), case["out_y0"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, case["grad_x0"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(neck[0].weight.grad, case["gradparam/fc0.weight"], rtol=1e-9, atol=1e-9)
    assert neck[1].momentum == 0.001


def test_the_loss_uses_the_labels_from_before_the_update():
    method = clustered(build())
    index = torch.tensor([41, 3, 3, 59, 0, 17, 8, 9])
    before = method.memory.labels[index].clone()
    weight = (1 / (method.memory.counts.double() + 1e-10)).sqrt()
    images = pictures()[index]
    scores = method.head(method.neck(method.backbone(images)))
    expected = torch.nn.functional.cross_entropy(scores, before, weight / weight.sum())
    rows = method.memory.bank.rows.clone()
    found = method(Batch(views=[images], index=index), at(0))
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)  # weights are float32
    moved = (method.memory.bank.rows != rows).any(dim=1).nonzero()[:, 0]
    assert set(moved.tolist()) <= set(index.tolist())
    assert len(moved) > 3


def test_clusters_stay_in_use():
    method = clustered(build())
    method.memory.labels.fill_(2)
    method.after_step(at(0))
    assert (method.memory.counts > 0).all()


def test_images_are_drawn_with_replacement_unless_told_otherwise():
    assert build().sample_weights().tolist() == [1.0] * IMAGES
    assert build().sample_groups() is None
    assert build(replace=False).sample_weights() is None


def test_more_clusters_than_the_images_fill_are_refused():
    with pytest.raises(UserError, match=r"`method\.clusters` 30 with at least 3 images each"):
        build(clusters=30)


def three_steps(shard: bool) -> tuple[Tensor, ...]:
    method = clustered(build(shard_memory=shard))
    wrapped = dist.wrap(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    losses = []
    for step in range(3):
        index = torch.randint(IMAGES, (8,), generator=torch.Generator().manual_seed(step))
        mine = index.chunk(dist.world())[dist.rank()]
        optimizer.zero_grad()
        result = wrapped(Batch(views=[pictures()[mine]], index=mine), at(step))
        result.loss.backward()
        optimizer.step()
        method.after_step(at(step))
        losses.append(dist.mean(result.loss))
    rows = method.memory.bank.fetch(torch.arange(IMAGES))
    weight = method.backbone.trunk.conv1.weight.detach()
    return torch.stack(losses), rows, method.memory.labels, method.memory.centroids, weight


@pytest.mark.dist
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_equal_one(two_ranks, shard):
    alone = three_steps(False)
    for found in two_ranks(three_steps, shard):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-7)
