"""Two ranks with half the batch each do what one rank does with all of it.

For methods whose losses see the images of all ranks, with batch norm over all of them. Methods whose keys are shuffled
or whose batch norm is per GPU have tests of their own.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from sslcli import dist
from sslcli.config import choice
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts
from sslcli.nn.norm import group_batch_norm

SETTINGS: dict[str, dict[str, Any]] = {
    "barlowtwins": {"dim": 12, "hidden": 16},
    "byol": {"dim": 8, "hidden": 16},
    "cae": {"target": "pixels", "heads": 2, "regressor_depth": 1, "decoder_depth": 1, "aligned_with": "previous"},
    "ijepa": {"width": 16, "depth": 1, "heads": 2},
    "mae": {"width": 16, "depth": 1, "heads": 2},
    "maskfeat": {"cell": 4},
    "mocov3": {"dim": 8, "hidden": 16},
    "relative_loc": {"hidden": 16, "dropout": 0.0},
    "rotation": {},
    "simclr": {"dim": 8},
    "simmim": {},
    "simsiam": {"dim": 16, "bottleneck": 8},
    "vicreg": {"dim": 12, "hidden": 16},
}
VIT = {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4, "image_size": 16}
BACKBONES: dict[str, dict[str, Any]] = {"cae": VIT, "ijepa": VIT, "mae": VIT, "maskfeat": VIT, "simmim": VIT}
SMALL = {"name": "resnet", "depth": 10, "width": 8, "stem": "small"}
BATCH = 16
STEPS = 3


def build(name: str) -> Method[Any]:
    torch.manual_seed(0)
    cfg = choice.module("sslcli.methods", name).Config(**SETTINGS[name])
    small = BACKBONES.get(name, SMALL)
    look = choice.module("sslcli.backbones", small["name"]).Config(**small)
    backbone: Backbone = choice.build("sslcli.backbones", look)(look)
    facts = RunFacts(images=64, batch_size=BATCH, part_size=BATCH, steps_per_epoch=4, total_steps=8)
    method: Method[Any] = choice.build("sslcli.methods", cfg)(cfg, backbone, facts)
    method.copy_student()
    group_batch_norm(method, local=BATCH // dist.world(), group="global")
    return method.double()


def batch_of(method: Method[Any], generator: torch.Generator) -> Batch:
    """Views of random images; for masked views, with as many masked patches in each."""
    count, kind = method.cfg.views.at_least, method.cfg.views.kind
    views = torch.randn(count, BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    masks = torch.rand(BATCH, 16, generator=generator).argsort(dim=1) >= 4 if kind == "masked" else None
    needs_blocks = method.cfg.views.blocks
    blocks = torch.rand(BATCH, 2, 16, generator=generator).argsort(dim=2)[:, :, :5] if needs_blocks else None
    return Batch(views=list(views), index=torch.arange(BATCH), masks=masks, blocks=blocks)


def trained(name: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Losses averaged over ranks, gradients of the first step, and all state after three steps."""
    method = build(name)
    wrapped = dist.wrap(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        whole = batch_of(method, generator)
        share = BATCH // dist.world()
        mine = slice(dist.rank() * share, (dist.rank() + 1) * share)
        masks = None if whole.masks is None else whole.masks[mine]
        blocks = None if whole.blocks is None else whole.blocks[mine]
        batch = Batch([view[mine] for view in whole.views], whole.index[mine], masks=masks, blocks=blocks)
        at = Progress(step=step, total=8, steps_per_epoch=4, seed=0)
        optimizer.zero_grad()
        result = wrapped(batch, at)
        result.loss.backward()
        losses.append(dist.mean(result.loss))
        gradients = gradients or {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
        method.before_update(at)
        optimizer.step()
        method.after_step(at)
    return torch.stack(losses), gradients, method.state_dict()


@pytest.mark.dist
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_equal_one(two_ranks, name):
    losses, gradients, state = trained(name)
    answers = two_ranks(trained, name)
    assert [key for key in state if not torch.equal(answers[0][2][key], answers[1][2][key])] == []
    for found_losses, found_gradients, found_state in answers:
        torch.testing.assert_close(found_losses, losses, rtol=1e-9, atol=1e-9)
        for found, wanted in ((found_gradients, gradients), (found_state, state)):
            assert found.keys() == wanted.keys()
            for key in wanted:
                torch.testing.assert_close(
                    found[key], wanted[key], rtol=1e-7, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
                )
