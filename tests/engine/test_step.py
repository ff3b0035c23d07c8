"""One optimiser step: clipping, what is computed again, and that nothing in it waits for the device."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslcli.config.load import load
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Batch, Progress
from sslcli.engine import loop
from sslcli.engine.build import facts_of, method_of, training_of
from sslcli.engine.record import Record, Silent
from sslcli.errors import PresetError

RESNET, VIT = (), ("backbone={name: vit, width: 24, depth: 2, heads: 2, patch: 8, image_size: 32, drop_path: 0.3}",)
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "aten.item", "unique")
"""Operations whose result the host must have before it can go on."""


def preset(*overrides: str) -> PretrainPreset:
    small = (
        "data.source.count=64",
        "data.batch_size=16",
        "run.steps=8",
        "run.epochs=null",
        "run.precision=fp32",
        "backbone.width=8",
    )
    return load("pretrain", "demo-digits", (*small, *overrides), {}).preset


def prepared(chosen: PretrainPreset) -> loop.Training:
    training, _ = training_of(method_of(chosen, facts_of(chosen, images=64, steps_per_epoch=4)), chosen)
    training.method.train()
    return training


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch([torch.randn(16, 3, 32, 32, generator=generator) for _ in range(2)], torch.arange(16))


def steps(training: loop.Training, chosen: PretrainPreset, count: int) -> None:
    for number in range(count):
        at = Progress(step=number, total=8, steps_per_epoch=4, seed=0)
        loop.step(training, batch(number), at, chosen)


def assert_same(one: loop.Training, other: loop.Training) -> None:
    ours, theirs = one.method.state_dict(), other.method.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def clipped(grads: list[Tensor], limit: float, *, each: bool) -> tuple[Tensor, list[Tensor]]:
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    optimizer, scaler = torch.optim.SGD(params, 0.1), torch.amp.GradScaler("cpu", enabled=False)
    norm = loop.clip(loop.Training(nn.Module(), nn.Module(), optimizer, scaler, 0.1), limit, each=each)  # type: ignore[arg-type]
    return norm, [p.grad for p in params if p.grad is not None]


@pytest.mark.golden
def test_every_gradient_is_clipped_by_itself_as_in_dino(golden: Path) -> None:
    with np.load(golden / "optim" / "clip_gradients.npz") as seen:
        grads, limit = [torch.tensor(seen[f"in_grad{n}"]) for n in range(3)], float(seen["param_clip"])
        norm, found = clipped(grads, limit, each=True)
        for n, grad in enumerate(found):
            np.testing.assert_allclose(grad.numpy(), seen[f"out_grad{n}"], rtol=1e-12)
        np.testing.assert_allclose(norm.item(), np.linalg.norm(seen["out_norms"]), rtol=1e-12)


def test_the_whole_gradient_is_clipped_as_torch_does() -> None:
    grads = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    norm, found = clipped(grads, 0.5, each=False)
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    assert torch.equal(nn.utils.clip_grad_norm_(params, 0.5), norm)
    for p, grad in zip(params, found, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("network", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("norm", ["global", "4"])
def test_computing_activations_again_changes_nothing(network: tuple[str, ...], norm: str) -> None:
    chosen = preset(*network, f"run.batch_norm={norm}")
    again = preset(*network, f"run.batch_norm={norm}", "run.checkpoint_activations=true")
    plain, recomputing = prepared(chosen), prepared(again)
    steps(plain, chosen, 2)
    with Ran(("convolution.default", "native_layer_norm.default")) as fewer:
        steps(plain, chosen, 1)
    steps(recomputing, again, 2)
    with Ran(("convolution.default", "native_layer_norm.default")) as more:
        steps(recomputing, again, 1)
    assert len(more.calls) > len(fewer.calls)
    assert_same(plain, recomputing)


def test_a_network_that_cannot_compute_again_is_refused() -> None:
    chosen = preset("run.checkpoint_activations=true")
    method = method_of(chosen, facts_of(chosen, images=64, steps_per_epoch=4))
    method.backbone.trunk = nn.Conv2d(3, 8, 3)
    with pytest.raises(PresetError, match=r"`run\.checkpoint_activations`: a `Conv2d`"):
        training_of(method, chosen)


class Ran(TorchDispatchMode):
    """Which operations of those asked for have run."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        super().__init__()
        self.wanted = wanted
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.wanted):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


OPTIMISERS = {
    "sgd": "optim={name: sgd, lr: 0.1}",
    "adamw": "optim={name: adamw, lr: 0.01, weight_decay_end: 0.4, layer_decay: 0.8}",
    "lars": "optim={name: lars, lr: 0.1, rules: [{one_dim: true, adapt: false}]}",
    "lamb": "optim={name: lamb, lr: 0.01}",
}
METHODS = {"simclr": "method={name: simclr}", "moco": "method={name: moco, queue: 64}"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_no_step_between_two_log_lines_waits_for_the_device(tmp_path: Path, method: str, optimiser: str) -> None:
    chosen = preset(METHODS[method], OPTIMISERS[optimiser], "run.clip=1.0", "run.accumulate=2")
    training = prepared(chosen)
    meter = loop.Meter(16, Record(tmp_path, 16, Silent()))
    seen = batch(0)
    for number in range(3):
        with Ran(WAITING) as ran:
            at = Progress(step=number, total=8, steps_per_epoch=4, seed=0)
            result, norm, _ = loop.step(training, seen, at, chosen)
            meter.add(number + 1, result, norm)
    on_host = len(training.optimizer.param_groups) if optimiser == "lamb" else 0  # timm counts steps there in tensors
    assert len(ran.calls) == on_host, ran.calls  # of the last step: the first may prepare


def test_the_count_of_waits_can_find_one() -> None:
    with Ran(WAITING) as ran:
        float(torch.ones(()))
        torch.ones(3).nonzero()
    assert len(ran.calls) == 2


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_stands_still_when_a_gradient_is_broken(optimiser: str) -> None:
    chosen = preset(OPTIMISERS[optimiser], "run.on_nonfinite=skip", "run.clip=1.0")
    training = prepared(chosen)
    steps(training, chosen, 2)
    before = {name: p.clone() for name, p in training.method.named_parameters()}
    broken = batch(2)
    broken.views[0][0, 0, 0, 0] = torch.nan
    loop.step(training, broken, Progress(step=2, total=8, steps_per_epoch=4, seed=0), chosen)
    for name, p in training.method.named_parameters():
        assert torch.equal(p, before[name]), name
    for state in training.optimizer.state.values():
        assert all(torch.isfinite(value).all() for value in state.values() if isinstance(value, Tensor))


def test_a_compiled_backbone_keeps_its_names_and_its_numbers() -> None:
    small = ("backbone={name: vit, width: 8, depth: 1, heads: 1, patch: 16, image_size: 32}", OPTIMISERS["sgd"])
    chosen, faster = preset(*small), preset(*small, "run.compile=true")
    plain, compiled = prepared(chosen), prepared(faster)
    torch._dynamo.utils.counters.clear()
    steps(plain, chosen, 1)
    assert not torch._dynamo.utils.counters["frames"]
    steps(compiled, faster, 1)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    ours, theirs = plain.method.state_dict(), compiled.method.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-3)  # the class token moves by 0.3
