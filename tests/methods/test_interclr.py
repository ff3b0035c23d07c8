"""InterCLR equal to OpenMMLab's: both losses with their margins, and which images they compare."""

import numpy as np
import pytest
import torch
from parts import Still
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli import dist
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.errors import UserError
from sslcli.methods import interclr

IMAGES = 48


def facts(batch: int = 8, images: int = IMAGES) -> RunFacts:
    return RunFacts(images=images, batch_size=batch, part_size=batch, steps_per_epoch=6, total_steps=60)


def at(step: int) -> Progress:
    return Progress(step=step, total=60, steps_per_epoch=6, seed=5)


SMALL = {"dim": 16, "queue": 32, "clusters": 4, "min_cluster": 3, "negatives": 8, "pool": 20, "centroids_every": 2}


def bare(**settings: object) -> interclr.InterCLR:
    """The method around a network that changes nothing, in float64."""
    cfg = interclr.Config(**(SMALL | settings))
    method = interclr.build(cfg, Still(cfg.dim), facts()).double()
    method.head, method.inter_head = nn.Identity(), nn.Identity()
    return method


def recorded(golden, name: str) -> dict[str, Tensor]:
    case = np.load(golden / "interclr" / f"{name}.npz")
    return {key: torch.from_numpy(case[key]) for key in case.files if key != "meta"}


def margins(case: dict[str, Tensor], way: str) -> tuple[float, float]:
    """Cosine and arc margin of a recording; none where it is switched off."""
    return tuple(
        float(case[f"param_{way}_{kind}_margin"]) if case.get(f"param_{way}_{kind}", torch.tensor(False)) else 0.0
        for kind in ("cos", "arc")
    )


INTER = ["random_cos", "random_both", "semihard_cos", "semihard_arcpos", "semieasy_none", "hard_cospos", "hard_arcneg"]


@pytest.mark.golden
@pytest.mark.parametrize("name", INTER)
def test_the_loss_between_images_is_openmmlabs(golden, name):
    case = recorded(golden, f"inter_{name}")
    cosine, arc = margins(case, "inter")
    method = bare(temperature=float(case["param_T"]), inter_cosine_margin=cosine, inter_arc_margin=arc)
    method.memory.bank.rows.copy_(case["in_feature_bank"])
    q = case["in_q"].clone().requires_grad_()
    found = method._inter(F.normalize(q, dim=1), interclr.Chosen(case["in_pos_idx"], case["in_neg_idx"]))
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), case["out_loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.grad, case["grad_q"], rtol=1e-9, atol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("name", INTER)
def test_choices_are_as_those_of_openmmlab(golden, name):
    """Positives share the label, negatives do not; hard ones are the same, others come from the same pool."""
    case = recorded(golden, f"inter_{name}")
    choose = name.split("_")[0]
    method = bare(choose=choose)
    method.memory.bank.rows.copy_(case["in_feature_bank"])
    method.memory.labels.copy_(case["in_label_bank"])
    q, labels = F.normalize(case["in_q"], dim=1), case["in_label_bank"]
    found = method._chosen(q, case["in_idx"], at(0))
    own = labels[case["in_idx"]]
    assert torch.equal(labels[found.positives], own)
    assert (labels[found.negatives] != own[:, None]).all()
    assert all(len(set(row)) == len(row) for row in found.negatives.tolist())
    similarity = q @ case["in_feature_bank"].T
    if choose == "hard":
        assert torch.equal(found.negatives, case["in_neg_idx"])
    elif choose != "random":
        pools = similarity.mul(1 if choose == "semihard" else -1).topk(20, dim=1).indices
        for row, pool, theirs, label in zip(found.negatives, pools, case["in_neg_idx"], own, strict=True):
            eligible = {i for i in pool.tolist() if labels[i] != label}
            assert set(theirs.tolist()) <= eligible
            if len(eligible) >= 8:
                assert set(row.tolist()) <= eligible
            else:
                assert eligible <= set(row.tolist())
    other = method._chosen(q, case["in_idx"], at(1))
    assert choose == "hard" or not torch.equal(found.negatives, other.negatives)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["plain", "cos", "arc"])
def test_the_loss_within_images_is_openmmlabs(golden, name):
    case = recorded(golden, f"intra_{name}")
    q = case["in_q"].clone().requires_grad_()
    unit = F.normalize(q, dim=1), F.normalize(case["in_k"], dim=1)
    found = interclr.info_nce_with_margins(*unit, case["in_queue"].T, float(case["param_T"]), *margins(case, "intra"))
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), case["out_loss"], rtol=1e-9, atol=1e-9)
    sound = ~case["info_grad_nan_rows"]
    torch.testing.assert_close(q.grad[sound], case["grad_q"][sound], rtol=1e-7, atol=1e-9)
    assert q.grad.isfinite().all()


def test_too_few_others_are_repeated():
    same = torch.ones(1, 6, dtype=torch.bool)
    same[0, [1, 4]] = False
    found = interclr.others(same, torch.rand(1, 6), torch.rand(1, 6), "hard", 4, 6)
    assert set(found[0].tolist()) == {1, 4}


def test_the_positive_is_anyone_of_the_cluster():
    method = bare()
    method.memory.labels.copy_(torch.arange(IMAGES) % 4)
    index = torch.zeros(8, dtype=torch.int64)
    q = F.normalize(torch.randn(8, 16, dtype=torch.float64), dim=1)
    drawn = {int(method._chosen(q, index, at(step)).positives[0]) for step in range(80)}
    assert drawn == set(range(0, IMAGES, 4))


def test_what_does_not_fit_is_refused():
    for settings in ({"negatives": 20}, {"pool": 49}, {"choose": "random", "negatives": 48}):
        with pytest.raises(UserError, match=r"`method\.negatives`"):
            bare(**settings)
    with pytest.raises(UserError, match=r"`method\.queue` 4 is shorter"):
        bare(queue=4)
    with pytest.raises(UserError, match=r"`method\.clusters` 30"):
        bare(clusters=30)


def two_steps(choose: str, shard: bool) -> tuple[Tensor, ...]:
    """Mean losses, rows and labels after two steps of eight images, over however many ranks there are."""
    torch.manual_seed(0)
    cfg = interclr.Config(**(SMALL | {"choose": choose, "shard_memory": shard, "share_head": False}))
    backbone = Still(10)
    backbone.trunk = nn.Linear(10, 10)
    method = interclr.build(cfg, backbone, facts()).double()
    method.copy_student()
    generator = torch.Generator().manual_seed(3)
    every = torch.randn(IMAGES, 10, generator=generator, dtype=torch.float64)
    share, rank, world = dist.share(IMAGES), dist.rank(), dist.world()
    method.before_epoch(at(0), lambda features: features(every[share.start : share.stop]).detach())
    losses = []
    for step in range(2):
        views = torch.randn(2, 8, 10, generator=generator, dtype=torch.float64).chunk(world, dim=1)[rank]
        index = torch.randint(IMAGES, (8,), generator=generator).chunk(world)[rank]
        method.zero_grad()
        result = method(Batch(views=list(views), index=index), at(step))
        result.loss.backward()
        method.after_step(at(step))
        losses.append(dist.mean(result.loss.detach()))
    gradient = dist.mean(method.inter_head[0].weight.grad)
    rows = method.memory.bank.fetch(torch.arange(IMAGES))
    return torch.stack(losses), gradient, rows, method.memory.labels, method.memory.centroids


@pytest.mark.dist
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("choose", ["semihard", "random"])
def test_two_ranks_equal_one(two_ranks, choose, shard):
    alone = two_steps(choose, False)
    for found in two_ranks(two_steps, choose, shard):
        torch.testing.assert_close(found, alone)
