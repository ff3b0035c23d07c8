"""What every method promises, for every file in `sslcli/methods`.

A new method falls under these tests by being there. If its defaults are too large for eight images of 32 pixels, add
what must be smaller to SETTINGS.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.config import choice, load
from sslcli.config.base import ViewNeeds
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.norm import average_statistics_, group_batch_norm
from sslcli.seeds import seed_here

METHODS = choice.members("sslcli.methods")
SETTINGS: dict[str, dict[str, Any]] = {
    "barlowtwins": {"dim": 24, "hidden": 32},
    "byol": {"dim": 16, "hidden": 32},
    "cae": {"target": "pixels", "heads": 2, "regressor_depth": 1, "decoder_depth": 1},
    "deepcluster": {"clusters": 8, "components": 4},
    "densecl": {"queue": 64},
    "dino": {"prototypes": 32, "hidden": 32, "bottleneck": 16},
    "ijepa": {"width": 16, "depth": 1, "heads": 2},
    "interclr": {"queue": 64, "clusters": 4, "min_cluster": 2, "negatives": 16, "pool": 32},
    "mae": {"width": 16, "depth": 1, "heads": 2},
    "maskfeat": {"cell": 4},
    "moco": {"queue": 64},
    "mocov3": {"dim": 16, "hidden": 32},
    "npid": {"negatives": 32},
    "odc": {"hidden": 32, "dim": 16, "clusters": 4, "min_cluster": 2},
    "relative_loc": {"hidden": 32},
    "simsiam": {"dim": 32, "bottleneck": 8},
    "swav": {"prototypes": 32, "queue": 16, "queue_from_epoch": 0, "freeze_steps": 1},
    "triplet": {"hidden": 32, "dim": 16, "ranks": [2, 3], "online_size": [16, 32], "target_size": [24, 32]},
    "vicreg": {"dim": 24, "hidden": 32},
}
PATCH = 4
VIT = {"name": "vit", "width": 16, "depth": 2, "heads": 2, "patch": PATCH, "image_size": 32}
BACKBONES: dict[str, dict[str, Any]] = {"cae": VIT, "ijepa": VIT, "mae": VIT, "maskfeat": VIT, "simmim": VIT}
SMALL = {"name": "resnet", "depth": 10, "width": 8, "stem": "small"}

IMAGES, BATCH, SIZE = 64, 8, 32
FACTS = RunFacts(images=IMAGES, batch_size=BATCH, part_size=BATCH, steps_per_epoch=8, total_steps=16)


def build(name: str, seed: int = 0) -> Method[Any]:
    """The method on a small backbone, as the engine builds it."""
    cfg = choice.module("sslcli.methods", name).Config(**SETTINGS.get(name, {}))
    small = BACKBONES.get(name, SMALL)
    look = choice.module("sslcli.backbones", small["name"]).Config(**small)
    seed_here(seed, "init")
    backbone: Backbone = choice.build("sslcli.backbones", look)(look)
    method: Method[Any] = choice.build("sslcli.methods", cfg)(cfg, backbone, FACTS)
    method.copy_student()
    return method.train()


def crops(needs: ViewNeeds, images: Tensor, generator: torch.Generator) -> Batch:
    views = [images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(needs.at_least)]
    return Batch(views=views, index=torch.arange(len(images)))


def rotations(needs: ViewNeeds, images: Tensor, generator: torch.Generator) -> Batch:
    return Batch(views=[torch.rot90(images, turns, (2, 3)) for turns in range(4)], index=torch.arange(len(images)))


def patches(needs: ViewNeeds, images: Tensor, generator: torch.Generator) -> Batch:
    rows = [row.chunk(3, dim=3) for row in images[:, :, :30, :30].chunk(3, dim=2)]
    return Batch(views=[patch for row in rows for patch in row], index=torch.arange(len(images)))


def masked(needs: ViewNeeds, images: Tensor, generator: torch.Generator) -> Batch:
    patches = (SIZE // PATCH) ** 2
    masks = torch.rand(len(images), patches, generator=generator).argsort(dim=1) >= patches // 4
    target = torch.nn.functional.interpolate(images, scale_factor=0.5).sigmoid()  # values in [0, 1]
    blocks = torch.rand(len(images), 2, patches, generator=generator).argsort(dim=2)[:, :, :5] if needs.blocks else None
    return Batch(
        [images], torch.arange(len(images)), masks=masks, masked=patches * 3 // 4, blocks=blocks, targets=[target]
    )


KINDS: dict[str, Callable[[ViewNeeds, Tensor, torch.Generator], Batch]] = {
    "crops": crops,
    "rotations": rotations,
    "patches": patches,
    "masked": masked,
}


def batch_of(method: Method[Any], step: int) -> Batch:
    """This rank's share of the batch of a step: noisy looks at random images."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    whole = KINDS[method.cfg.views.kind](method.cfg.views, images, generator)
    rank, world = dist.rank(), dist.world()
    return Batch(
        views=[view.chunk(world)[rank] for view in whole.views],
        index=whole.index.chunk(world)[rank],
        masks=None if whole.masks is None else whole.masks.chunk(world)[rank],
        masked=whole.masked,
        blocks=None if whole.blocks is None else whole.blocks.chunk(world)[rank],
        targets=[target.chunk(world)[rank] for target in whole.targets],
    )


def at(step: int, seed: int = 0) -> Progress:
    return Progress(step=step, total=FACTS.total_steps, steps_per_epoch=FACTS.steps_per_epoch, seed=seed)


def forward(method: nn.Module, batch: Batch, now: Progress) -> StepResult:
    seed_here(now.seed, "step", now.step, 0, dist.rank())
    result: StepResult = method(batch, now)
    return result


def sgd(method: Method[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def train(method: Method[Any], steps: int, seed: int = 0) -> Method[Any]:
    """Some steps in the engine's order."""
    optimizer, wrapped = sgd(method), dist.wrap(method)

    def look(features: Callable[[Tensor], Tensor]) -> Tensor:
        images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(99))
        share = dist.share(IMAGES)
        method.eval()
        with torch.no_grad():
            rows = features(images[share.start : share.stop])
        method.train()
        return rows

    method.before_epoch(at(0, seed), look)
    for step in range(steps):
        now = at(step, seed)
        optimizer.zero_grad()
        forward(wrapped, batch_of(method, step), now).loss.backward()
        method.before_update(now)
        optimizer.step()
        method.after_step(now)
        average_statistics_(method)
    return method


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_is_named_as_its_file(self, name):
        member = choice.module("sslcli.methods", name)
        assert member.Config.model_fields["name"].default == name
        assert member.__doc__
        assert "http" in member.__doc__
        assert all(field.description for key, field in member.Config.model_fields.items() if key != "name")

    def test_has_a_preset(self, name):
        assert name in {load.load("pretrain", preset).preset.method.name for preset in load.names("pretrain")}

    def test_gives_a_finite_scalar_and_detached_values(self, name):
        method = build(name)
        result = forward(method, batch_of(method, 0), at(0))
        assert result.loss.shape == ()
        assert result.loss.isfinite()
        for value in result.scalars.values():
            assert value.shape == ()
            assert value.isfinite()
            assert not value.requires_grad

    def test_every_trainable_parameter_gets_a_gradient(self, name):
        method = build(name)
        forward(method, batch_of(method, 0), at(0)).loss.backward()
        trainable = [(key, p) for key, p in method.named_parameters() if p.requires_grad]
        assert trainable
        assert not [key for key, p in trainable if p.grad is None]
        assert all(p.grad.isfinite().all() for _, p in trainable)

    def test_slow_parts_move_only_after_the_step(self, name):
        method = train(build(name), 1)  # from the second step on, fast and slow differ
        still = [key for key, p in method.named_parameters() if not p.requires_grad]
        before = state(method)
        optimizer = sgd(method)
        forward(method, batch_of(method, 1), at(1)).loss.backward()
        method.before_update(at(1))
        optimizer.step()
        assert all(torch.equal(method.state_dict()[key], before[key]) for key in still)
        assert all(p.grad is None for p in method.parameters() if not p.requires_grad)
        method.after_step(at(1))
        assert still == [key for key, p in method.named_parameters() if not p.requires_grad]
        moved = [key for key in still if not torch.equal(method.state_dict()[key], before[key])]
        assert bool(moved) == any(key.startswith("slow_") for key in still)

    def test_its_state_is_all_it_remembers(self, name):
        method, other = train(build(name), 3), build(name, seed=1)
        other.load_state_dict(method.state_dict())
        losses = [forward(each, batch_of(method, 3), at(3)).loss for each in (method, other)]
        assert torch.equal(*losses)
        assert same(state(method), state(other))

    def test_half_precision_stays_finite(self, name):
        method = build(name)
        with torch.autocast("cpu", torch.bfloat16):
            result = forward(method, batch_of(method, 0), at(0))
        result.loss.backward()
        assert result.loss.dtype == torch.float32
        assert result.loss.isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)

    def test_exports_a_network_like_its_backbone(self, name):
        method = build(name)
        exported = method.exported()
        assert isinstance(exported, Backbone)
        assert exported.state_dict().keys() == method.backbone.state_dict().keys()
        assert exported(torch.randn(2, 3, SIZE, SIZE)).shape == (2, exported.dim)

    def test_the_seed_decides_everything(self, name):
        first, again, other = (state(train(build(name, seed), 3, seed)) for seed in (0, 0, 1))
        assert same(first, again)
        assert not same(first, other)

    @pytest.mark.dist
    def test_state_is_equal_on_all_ranks(self, name, two_ranks):
        first, second = two_ranks(three_steps, name)
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def three_steps(name: str) -> dict[str, Tensor]:
    method = build(name)
    group_batch_norm(method, local=BATCH // dist.world(), group=BATCH // dist.world())  # each rank its own statistics
    return state(train(method, 3))
