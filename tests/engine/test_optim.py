import copy
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslcli.config.optim import AdamW, AnyOptim, Lamb, ParamRule, Sgd
from sslcli.config.optim import Lars as LarsWords
from sslcli.engine.optim import (
    HEAD,
    Lars,
    depths,
    layer_scales,
    make_optimizer,
    param_groups,
    set_lr,
    set_weight_decay,
    shares_of,
    table,
)
from sslcli.errors import PresetError

CPU = torch.device("cpu")
PLAIN = {"weight_decay": 0.0, "adapt": False}

Recording = dict[str, np.ndarray]
Named = list[tuple[str, nn.Parameter]]


@pytest.fixture
def recorded(golden: Path) -> Callable[[str], Recording]:
    def load(case: str) -> Recording:
        with np.load(golden / "optim" / f"{case}.npz") as archive:
            return {key: archive[key] for key in archive.files}

    return load


def parameters_of(seen: Recording) -> Named:
    return [
        (key.removeprefix("in_param/"), nn.Parameter(torch.tensor(value)))
        for key, value in seen.items()
        if key.startswith("in_param/")
    ]


def trajectory(seen: Recording, cfg: AnyOptim, base_lr: float = 1.0) -> dict[str, np.ndarray]:
    """Parameters after each step (steps, ...) when fed the recorded gradients and learning rates."""
    named = parameters_of(seen)
    optimizer = make_optimizer(param_groups(named, cfg, cfg.rules), cfg, base_lr, CPU)
    path: dict[str, list[np.ndarray]] = {name: [] for name, _ in named}
    for step, lr in enumerate(seen["in_lr"]):
        for name, p in named:
            p.grad = torch.tensor(seen[f"in_grad/{name}"][step])
        set_lr(optimizer, base_lr, float(lr))
        optimizer.step()
        for name, p in named:
            path[name].append(p.detach().numpy().copy())
    return {name: np.stack(values) for name, values in path.items()}


def lars(variant: str, *rules: ParamRule, **more: object) -> LarsWords:
    return LarsWords.model_validate({"lr": 1.0, "weight_decay": 0.01, "variant": variant, "rules": rules, **more})


BY_NAME = ParamRule(match=r"(bn|gn)(\d+)?.(weight|bias)|bias", **PLAIN)
ONE_DIM = ParamRule(one_dim=True, **PLAIN)
SCALAR_IN = ParamRule(match="^scale$", weight_decay=0.01, adapt=True)

EQUALS = {
    "lars_mmselfsup0x": lars("lr_inside", BY_NAME),
    "lars_mmselfsup0x_nesterov": lars("lr_inside", BY_NAME, nesterov=True),
    "lars_google_tf2_classic": lars("google", BY_NAME),
    "lars_google_tf2_classic_nesterov": lars("google", BY_NAME, nesterov=True),
    "lars_barlowtwins": lars(
        "lr_outside",
        ParamRule(one_dim=True, lr_scale=0.0048 / 0.2, **PLAIN),
        ParamRule(match="^scale$", lr_scale=1.0, weight_decay=0.01, adapt=True),
    ),
    "lars_vicreg": lars("lr_outside", ONE_DIM, SCALAR_IN),
    "lars_dino": lars("lr_outside", ONE_DIM, SCALAR_IN),
    "lars_mocov3": lars("lr_outside", ONE_DIM),
    "lars_deepmind_byol_filtered": lars("lr_outside", ONE_DIM),
    "larc_apex_clipFalse": lars("larc"),
}


@pytest.mark.golden
@pytest.mark.parametrize("case", EQUALS)
def test_lars_equals_its_references(recorded, case: str) -> None:
    seen = recorded(case)
    ours = trajectory(seen, EQUALS[case], base_lr=0.2 if case == "lars_barlowtwins" else 1.0)
    assert len(ours) >= 8
    for name, path in ours.items():
        np.testing.assert_allclose(path, seen[f"out_traj/{name}"], rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("column", "cfg"),
    [
        ("mmselfsup0x", lars("lr_inside", BY_NAME)),
        ("barlowtwins", lars("lr_outside", ONE_DIM)),
        ("mocov3", lars("lr_outside", ONE_DIM)),
        ("larc_swav", lars("larc")),
    ],
)
def test_lars_variants_differ_on_equal_inputs_as_their_references_do(recorded, column: str, cfg: LarsWords) -> None:
    seen = recorded("lars_compare_same_inputs")
    for name, path in trajectory(seen, cfg).items():
        np.testing.assert_allclose(path[0], seen[f"out_step1/{column}/{name}"], rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(path[-1], seen[f"out_final/{column}/{name}"], rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize(("case", "wrong"), [("lars_mmselfsup0x", "lr_outside"), ("lars_mocov3", "lr_inside")])
def test_the_recordings_tell_the_variants_apart(recorded, case: str, wrong: str) -> None:
    seen = recorded(case)
    ours = trajectory(seen, EQUALS[case].model_copy(update={"variant": wrong}))
    assert np.abs(ours["conv1.weight"] - seen["out_traj/conv1.weight"]).max() > 1e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4 * 4, 6))
        self.predictor = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.predictor(self.trunk(images))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(5, 3, 6, 6)).square().mean().backward()
        set_lr(optimizer, 0.1, 1 / (1 + step))
        optimizer.step()


ALL = [
    Sgd(lr=0.1, weight_decay=1e-4),
    Sgd(lr=0.1, nesterov=True),
    AdamW(lr=0.1, weight_decay=0.05),
    Lamb(lr=0.1),
    *(LarsWords(lr=0.1, variant=v, eta=0.02) for v in ("lr_inside", "google", "lr_outside", "larc")),
]


@pytest.mark.parametrize("cfg", ALL, ids=lambda cfg: f"{cfg.name}-{getattr(cfg, 'variant', '')}")
def test_a_saved_optimiser_continues_to_the_bit(net: Net, cfg: AnyOptim) -> None:
    rules = (ParamRule(one_dim=True, weight_decay=0.0, adapt=False), ParamRule(match="predictor", fixed_lr=True))
    groups = param_groups(net.named_parameters(), cfg, rules)
    optimizer = make_optimizer(groups, cfg, 0.1, CPU)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Net()
    other.load_state_dict(saved["net"])
    again = make_optimizer(param_groups(other.named_parameters(), cfg, rules), cfg, 0.1, CPU)
    again.load_state_dict(saved["optimizer"])
    train(other, again, range(3, 6))

    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    ours, theirs = optimizer.state_dict(), again.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("cfg", "plain"),
    [
        (Sgd(lr=0.1, weight_decay=1e-3), lambda ps: torch.optim.SGD(ps, 0.1, 0.9, weight_decay=1e-3, foreach=False)),
        (AdamW(lr=0.1), lambda ps: torch.optim.AdamW(ps, 0.1, foreach=False)),
    ],
)
def test_the_fused_forms_equal_the_plain_ones(net: Net, cfg: AnyOptim, plain) -> None:
    twin = copy.deepcopy(net)
    ours = make_optimizer(param_groups(net.named_parameters(), cfg, ()), cfg, 0.1, CPU)
    assert all(group["fused"] for group in ours.param_groups)
    theirs = plain(twin.parameters())
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_lamb_scales_a_step_by_the_norm_of_the_weights() -> None:
    p, q = (nn.Parameter(torch.full((4,), size)) for size in (1.0, 10.0))
    cfg = Lamb(lr=0.1, weight_decay=1e-12)
    optimizer = make_optimizer(param_groups([("p", p), ("q", q)], cfg, ()), cfg, 0.1, CPU)
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9))
    torch.testing.assert_close(q.detach(), torch.full((4,), 9.0))


class CountDispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["lr_inside", "google", "lr_outside", "larc"])
def test_lars_on_the_159_tensors_of_a_resnet_takes_few_dispatches_and_never_waits(variant: str) -> None:
    shapes = [(4, 3, 3, 3)] * 53 + [(4,)] * 106
    named = [(f"p{i}", nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]
    cfg = lars(variant, ONE_DIM, nesterov=True)
    optimizer = make_optimizer(param_groups(named, cfg, cfg.rules), cfg, 0.1, CPU)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with CountDispatches() as counted:
        optimizer.step()
    assert len(counted.calls) <= 25, counted.calls
    assert not [call for call in counted.calls if "_local_scalar_dense" in call or "nonzero" in call]


@pytest.mark.parametrize("variant", ["lr_inside", "google", "lr_outside", "larc"])
def test_lars_leaves_parameters_without_gradient_alone_and_stays_finite_on_zeros(variant: str) -> None:
    idle, zero = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    zero.grad = torch.zeros(3)
    optimizer = Lars([idle, zero], 0.1, weight_decay=0.1, variant=variant)
    optimizer.step()
    assert torch.equal(idle, torch.ones(3))
    assert torch.equal(zero, torch.zeros(3))


def test_lars_obeys_a_closure() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Lars([p], 0.1)

    def closure() -> float:
        loss = p.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert not torch.equal(p, torch.ones(3))


def test_later_rules_win_and_equal_treatment_shares_a_group(net: Net) -> None:
    rules = [
        ParamRule(one_dim=True, weight_decay=0.0, adapt=False),
        ParamRule(match="predictor", lr_scale=10.0, fixed_lr=True),
        ParamRule(match=r"predictor\.bias", lr_scale=2.0, momentum=0.5),
    ]
    groups = param_groups(net.named_parameters(), LarsWords(lr=1, weight_decay=1e-6), rules)
    found = {tuple(g["names"]): {k: v for k, v in g.items() if k not in ("params", "names")} for g in groups}
    basis = {"lr_scale": 1.0, "fixed_lr": False, "momentum": 0.9}
    assert found == {
        ("trunk.0.weight", "trunk.3.weight"): basis | {"weight_decay": 1e-6, "adapt": True},
        ("trunk.0.bias", "trunk.1.weight", "trunk.1.bias", "trunk.3.bias"): basis | PLAIN,
        ("predictor.weight",): basis | {"weight_decay": 1e-6, "adapt": True, "lr_scale": 10.0, "fixed_lr": True},
        ("predictor.bias",): PLAIN | {"lr_scale": 2.0, "fixed_lr": True, "momentum": 0.5},
    }
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))


def test_frozen_parameters_are_in_no_group(net: Net) -> None:
    net.trunk.requires_grad_(False)
    groups = param_groups(net.named_parameters(), Sgd(lr=1), ())
    assert [g["names"] for g in groups] == [["predictor.weight", "predictor.bias"]]


def test_a_rule_that_selects_nothing_is_refused_by_name(net: Net) -> None:
    net.trunk.requires_grad_(False)
    with pytest.raises(PresetError, match=r"`match: trunk` selects none of the 2 trainable") as caught:
        param_groups(net.named_parameters(), Sgd(lr=1), [ParamRule(match="trunk", lr_scale=2)])
    assert caught.value.hint is not None
    assert "`predictor.weight`" in caught.value.hint


def test_a_momentum_that_the_optimiser_does_not_have_is_refused(net: Net) -> None:
    with pytest.raises(PresetError, match="`momentum`, which `adamw` does not have"):
        param_groups(net.named_parameters(), AdamW(lr=1), [ParamRule(match="bias", momentum=0.5)])


def test_the_table_shows_every_group(net: Net) -> None:
    rules = [ParamRule(one_dim=True, weight_decay=0.0, adapt=False), ParamRule(match="predictor", fixed_lr=True)]
    lines = table(param_groups(net.named_parameters(), LarsWords(lr=1, weight_decay=1e-6), rules)).splitlines()
    assert lines[0].split("  ")[0] == "group"
    assert lines[1].split() == ["0", "2", "984", "x", "1", "1e-06", "0.9", "yes", "trunk.0.weight"]
    assert lines[2].split() == ["1", "4", "30", "x", "1", "0", "0.9", "-", "trunk.0.bias"]
    assert lines[3].split() == ["2", "1", "36", "x", "1", "fixed", "1e-06", "0.9", "yes", "predictor.weight"]
    assert len(lines) == 5


@pytest.mark.golden
def test_fixed_rates_follow_simsiam(net: Net, golden: Path) -> None:
    with np.load(golden / "schedules" / "simsiam_fix_lr.npz") as archive:
        rates = archive["out_value"]
    cfg = Sgd(lr=0.05, per=256)
    base = cfg.effective_lr(512)
    groups = param_groups(net.named_parameters(), cfg, [ParamRule(match="predictor", fixed_lr=True)])
    optimizer = make_optimizer(groups, cfg, base, CPU)
    for encoder, predictor, _ in rates:
        returned = set_lr(optimizer, base, encoder / base)
        by_name = {g["names"][0]: g["lr"] for g in optimizer.param_groups}
        assert by_name["trunk.0.weight"] == pytest.approx(encoder, rel=1e-12)
        assert by_name["predictor.weight"] == pytest.approx(predictor, rel=1e-12)
        assert returned == by_name["trunk.0.weight"]


def test_scaled_groups_follow_the_schedule_too(net: Net) -> None:
    groups = param_groups(net.named_parameters(), Sgd(lr=1), [ParamRule(match="bias", lr_scale=0.024)])
    optimizer = make_optimizer(groups, Sgd(lr=1), 1.6, CPU)
    assert [g["lr"] for g in optimizer.param_groups] == [1.6, 1.6 * 0.024]
    assert set_lr(optimizer, 1.6, 0.5) == 0.8
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.8, 0.8 * 0.024])


@pytest.mark.golden
def test_weight_decay_moves_as_in_dino(net: Net, golden: Path) -> None:
    with np.load(golden / "optim" / "cosine_scheduler_wd.npz") as archive:
        start, end, path = (
            float(archive["param_base_value"]),
            float(archive["param_final_value"]),
            archive["out_schedule"],
        )
    cfg = AdamW(lr=0.1, weight_decay=start, weight_decay_end=end)
    rules = [ParamRule(one_dim=True, weight_decay=0), ParamRule(match="predictor.weight", weight_decay=0.01)]
    optimizer = make_optimizer(param_groups(net.named_parameters(), cfg, rules), cfg, 0.1, CPU)
    for step, value in enumerate(path):
        set_weight_decay(optimizer, start, end, step / len(path))
        found = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["names"]}
        assert found["trunk.0.weight"] == pytest.approx(value, rel=1e-12)
        assert found["trunk.1.weight"] == 0
        assert found["predictor.weight"] == 0.01


def test_the_table_says_that_weight_decay_moves(net: Net) -> None:
    cfg = AdamW(lr=0.1, weight_decay=0.04, weight_decay_end=0.4)
    lines = table(param_groups(net.named_parameters(), cfg, [ParamRule(one_dim=True, weight_decay=0)])).splitlines()
    assert "0.04 at first" in lines[1]
    assert "at first" not in lines[2]


def as_timm_names(name: str) -> str:
    """The authors' Swin ends a stage with the merging of patches; timm's begins the next one with it."""
    stage = re.match(r"layers\.(\d+)\.downsample", name)
    return name if stage is None else name.replace(stage[0], f"layers.{int(stage[1]) + 1}.downsample")


SHARED_BIAS = {"depth": 4, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": True}


@pytest.mark.golden
@pytest.mark.parametrize(
    ("case", "network", "settings"),
    [
        ("mae_vit_base_cls", "vit_base_patch16_224", {}),
        ("mae_vit_base_gap", "vit_base_patch16_224", {"global_pool": "avg"}),
        ("simmim_vit_base", "beit_base_patch16_224", {}),
        ("beit_d4_shared", "beit_base_patch16_224", {"global_pool": "token", **SHARED_BIAS}),
        ("simmim_swin_base", "swin_base_patch4_window7_224", {}),
    ],
)
def test_layer_decay_equals_its_references(golden: Path, case: str, network: str, settings: dict[str, object]) -> None:
    seen = json.loads((golden / "layer_decay" / f"{case}.json").read_text())
    with torch.device("meta"):
        trunk = timm.create_model(network, num_classes=0, **settings)
    ours = layer_scales(trunk, seen["decay"], "trunk.")
    theirs = {as_timm_names(name): scale for name, scale in seen["scales"].items() if not name.startswith("head.")}
    assert {name.removeprefix("trunk.") for name in ours} == theirs.keys()
    assert {name: ours[f"trunk.{name}"] for name in theirs} == pytest.approx(theirs, rel=1e-12)


def test_the_levels_of_a_resnet_are_its_stages() -> None:
    with torch.device("meta"):
        levels = depths(timm.create_model("resnet18", num_classes=0))
    first = {name: levels[name] for name in ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.1.bn2.bias")}
    assert list(first.values()) == [0, 0, 1, 1]
    assert levels["layer4.1.conv2.weight"] == 4
    assert levels[HEAD] == 5


def test_layer_decay_of_an_unknown_network_is_refused(net: Net) -> None:
    with pytest.raises(PresetError, match=r"`optim\.layer_decay`.* `Net`"):
        layer_scales(net, 0.5, "")


def test_layer_decay_multiplies_what_the_rules_say(net: Net) -> None:
    scales = {"trunk.0.weight": 0.25, "trunk.3.weight": 0.5, "frozen": 0.1}
    rules = [ParamRule(match="trunk.0", lr_scale=4.0)]
    groups = param_groups(net.named_parameters(), Sgd(lr=1), rules, scales)
    found = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert found["trunk.0.weight"] == 1.0
    assert found["trunk.0.bias"] == 4.0
    assert found["trunk.3.weight"] == 0.5
    assert found["predictor.weight"] == 1.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_state_stored_in_another_layout_goes_on_as_if_nothing_had_happened(name):
    """Checkpoints in shares hold plain layouts; `run.channels_last` may change between a run and its resumption."""

    def optimizer_of(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [weight]}
        if name == "sgd":
            return torch.optim.SGD([group], 0.1, momentum=0.9, fused=True)
        return torch.optim.AdamW([group], 0.1, fused=True)

    last = torch.channels_last
    start, *gradients = torch.randn(4, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(start.clone(memory_format=last))
    straight = optimizer_of(weight)
    for gradient in gradients[:2]:
        weight.grad = gradient.contiguous(memory_format=last)
        straight.step()
    stored = straight.state_dict()
    as_stored = torch.contiguous_format
    plain = {n: {k: x.clone(memory_format=as_stored) for k, x in kept.items()} for n, kept in stored["state"].items()}
    resumed = torch.nn.Parameter(weight.detach().clone(memory_format=last))
    other = optimizer_of(resumed)
    other.load_state_dict(shares_of({**stored, "state": plain}, other))
    for one, optimizer in ((weight, straight), (resumed, other)):
        one.grad = gradients[2].contiguous(memory_format=last)
        optimizer.step()
    torch.testing.assert_close(resumed, weight, rtol=0, atol=0)
