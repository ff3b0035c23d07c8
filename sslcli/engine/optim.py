"""Optimisers: which parameter is treated how, LARS, and the learning rate of each group."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, assert_never, final, overload

import torch
from timm.optim.lamb import Lamb
from torch import Tensor, nn

from sslcli import dist
from sslcli.config import optim as words
from sslcli.config.optim import AnyOptim, ParamRule
from sslcli.errors import PresetError

Group = dict[str, Any]
Variant = Literal["lr_inside", "google", "lr_outside", "larc"]

FUSED_ON = ("cpu", "cuda")
EVEN: Mapping[str, float] = {}
"""No parameter's rate is scaled."""
HEAD = "head of the network"
"""Stands for whatever is above a network's own layers."""
EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Treatment:
    """What the optimiser does to a parameter; parameters of equal treatment share a group."""

    lr_scale: float
    fixed_lr: bool
    weight_decay: float
    momentum: float | None
    adapt: bool
    fixed_decay: bool | None
    """Whether weight decay stays while that of others moves; None where it moves nowhere."""

    def changed_by(self, rule: ParamRule) -> "Treatment":
        """This treatment with everything replaced that the rule speaks of."""
        changes = rule.model_dump(exclude={"match", "one_dim"}, exclude_none=True)
        if self.fixed_decay is not None and rule.weight_decay is not None:
            changes["fixed_decay"] = True
        return replace(self, **changes)


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    cfg: AnyOptim,
    rules: Sequence[ParamRule],
    scales: Mapping[str, float] = EVEN,
) -> list[Group]:
    """Trainable parameters in as few groups as their treatment allows, in order of first appearance.

    A group carries `params`, `names`, and the fields of `Treatment` that say anything.

    Args:
        named: parameters by name.
        cfg: the optimiser.
        rules: the method's own and then the preset's; later ones win.
        scales: by what the rate of some parameters is multiplied besides (`layer_scales`).

    Raises:
        PresetError: a rule selects no trainable parameter, or sets a momentum that the optimiser does not have.
    """
    trainable = {name: p for name, p in named if p.requires_grad}
    momentum = cfg.momentum if isinstance(cfg, words.Sgd | words.Lars) else None
    adapt, fixed_decay = isinstance(cfg, words.Lars), None if cfg.weight_decay_end is None else False
    plain = Treatment(1.0, False, cfg.weight_decay, momentum, adapt, fixed_decay)
    treatments = dict.fromkeys(trainable, plain)
    for rule in rules:
        said = "`one_dim: true`" if rule.match is None else f"`match: {rule.match}`"
        if rule.momentum is not None and momentum is None:
            raise PresetError(f"the parameter rule {said} sets `momentum`, which `{cfg.name}` does not have")
        selected = [name for name, p in trainable.items() if rule.selects(name, p.ndim)]
        if not selected:
            names = list(trainable)
            some = ", ".join(f"`{name}`" for name in names[:: 1 + len(names) // 6])
            raise PresetError(
                f"the parameter rule {said} selects none of the {len(names)} trainable parameters",
                hint=f"their names look like {some}; remove the rule or correct its pattern",
            )
        treatments |= {name: treatments[name].changed_by(rule) for name in selected}
    for name in trainable.keys() & scales.keys():
        treatments[name] = replace(treatments[name], lr_scale=treatments[name].lr_scale * scales[name])
    members: dict[Treatment, list[str]] = {}
    for name, treatment in treatments.items():
        members.setdefault(treatment, []).append(name)
    return [
        {"params": [trainable[name] for name in names], "names": names}
        | {key: value for key, value in asdict(treatment).items() if value is not None}
        for treatment, names in members.items()
    ]


def layer_scales(trunk: nn.Module, decay: float, prefix: str) -> dict[str, float]:
    """`decay` to the power of the number of layers above, for every parameter of a network (BEiT, MAE, SimMIM).

    The highest level, where nothing is above, is that of heads and final norms; below come the blocks (the stages, of a
    ResNet), and lowest is the stem.

    Args:
        trunk: a network that timm can group by layers.
        decay: in (0, 1].
        prefix: put before the names of its parameters.

    Raises:
        PresetError: it cannot.
    """
    levels = depths(trunk)
    top = levels.pop(HEAD)
    return {prefix + name: decay ** (top - level) for name, level in levels.items()}


def depths(trunk: nn.Module) -> dict[str, int]:
    """The level of every parameter, from 0, and that of `HEAD`.

    timm's own grouping, but for three differences from the authors' code: there the final norm is on the head's level
    (in timm's, on the last block's), and so is the position bias that BEiT's blocks share (the stem's); and what merges
    patches between stages of a Swin is on the level of the block before it (of the block after it).
    """
    from timm.models import Beit, ResNet, SwinTransformer, VisionTransformer
    from timm.models._manipulate import group_with_matcher

    try:
        matcher = trunk.group_matcher(coarse=isinstance(trunk, ResNet))  # type: ignore[operator]
    except AttributeError:
        raise PresetError(
            f"`optim.layer_decay`: it is not known which layers a `{type(trunk).__name__}` has",
            hint="leave `optim.layer_decay` out, or use `optim.rules` with `lr_scale`",
        ) from None
    names = [name for name, _ in trunk.named_parameters()]
    levels: dict[str, int] = group_with_matcher(((name, None) for name in [*names, HEAD]), matcher, reverse=True)
    if isinstance(trunk, VisionTransformer | SwinTransformer | Beit):
        levels |= {name: levels[HEAD] for name in names if name.startswith(("norm.", "rel_pos_bias."))}
    if isinstance(trunk, SwinTransformer):
        levels |= {name: levels[name] - 1 for name in names if ".downsample." in name}
    return levels


def table(groups: Sequence[Group]) -> str:
    """One line per group: how many tensors and numbers, how they are treated, and the first of their names."""
    head = ("group", "tensors", "parameters", "lr", "weight decay", "momentum", "adapted", "first")
    lines = [head] + [
        (
            str(number),
            str(len(group["params"])),
            f"{sum(p.numel() for p in group['params']):,}",
            f"x {group['lr_scale']:g}" + (" fixed" if group["fixed_lr"] else ""),
            f"{group['weight_decay']:g}" + (" at first" if group.get("fixed_decay") is False else ""),
            f"{group['momentum']:g}" if "momentum" in group else "-",
            "yes" if group["adapt"] else "-",
            group["names"][0],
        )
        for number, group in enumerate(groups)
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def make_optimizer(groups: Sequence[Group], cfg: AnyOptim, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser over these groups at base rate `lr`; SGD and AdamW run as one fused kernel where torch has it."""
    groups = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    fused = device.type in FUSED_ON
    match cfg:
        case words.Sgd():
            whole = not any(dist.is_share(p) for group in groups for p in group["params"])
            return torch.optim.SGD(groups, lr, cfg.momentum, nesterov=cfg.nesterov, fused=fused and whole)
        case words.AdamW():
            return torch.optim.AdamW(groups, lr, cfg.betas, cfg.eps, fused=fused)
        case words.Lars():
            return Lars(groups, lr, cfg.momentum, eta=cfg.eta, variant=cfg.variant, nesterov=cfg.nesterov)
        case words.Lamb():
            return Lamb(groups, lr, betas=cfg.betas, eps=cfg.eps, max_grad_norm=None)
        case _:
            assert_never(cfg)


def shares_of(state: Group, optimizer: torch.optim.Optimizer) -> Group:
    """An optimiser's state of whole tensors, cut and laid out in memory as its parameters are.

    A fused optimiser walks through both as they lie: in another layout every number would meet a wrong one.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {
        number: {
            name: _like(x, params[number]) if isinstance(x, Tensor) and x.shape == params[number].shape else x
            for name, x in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": kept}


def _like(x: Tensor, parameter: Tensor) -> Tensor:
    if dist.is_share(parameter):
        return dist.share_of(x, parameter)
    return torch.empty_like(parameter, dtype=x.dtype, device=x.device, requires_grad=False).copy_(x)


def set_lr(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> float:
    """Give every group its learning rate for the coming step; the scheduled rate before group scales is returned."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["lr_scale"] * (1.0 if group["fixed_lr"] else factor)
    return base_lr * factor


def set_weight_decay(optimizer: torch.optim.Optimizer, start: float, end: float, fraction: float) -> None:
    """Give the groups whose weight decay moves its value after `fraction` of the run: half a cosine (DINO)."""
    now = end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
    for group in optimizer.param_groups:
        if group["fixed_decay"] is False:
            group["weight_decay"] = now


@final
class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), in the four forms that are in use.

    With weight w, gradient g, weight decay wd and momentum buffer v (zero at first), every step does

        v <- m v + s q (g + wd w),   w <- w - r v   (with Nesterov: w <- w - r (m v + s q (g + wd w)))

    where q is the trust ratio; `lr_inside` and `google` have s = lr, r = 1, the others s = 1, r = lr.

    | variant      | q                               | where a norm is zero                 | equal to               |
    | ------------ | ------------------------------- | ------------------------------------ | ---------------------- |
    | `lr_inside`  | eta |w| / (|g| + wd |w| + 1e-8) | q = 1                                | MMSelfSup 0.x          |
    | `google`     | eta |w| / |g + wd w|            | q = 1                                | google-research/simclr |
    | `lr_outside` | eta |w| / |g + wd w|            | q = 1                                | Barlow Twins, VICReg,  |
    |              |                                 |                                      | MoCo v3, DINO, BYOL    |
    | `larc`       | eta |w| / (|g| + wd |w| + 1e-8) | |w|: q = 1; |g|: q = 0, so that not  | apex LARC, clip=False  |
    |              |                                 | even the weight decays               | (SwAV)                 |

    Groups with `adapt: False` have q = 1 throughout. No step waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        variant: Variant = "lr_outside",
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "variant": variant,
            "nesterov": nesterov,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, [self._buffer(p) for p in params], group)
        return loss

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _update(self, params: list[Tensor], buffers: list[Tensor], group: Group) -> None:
        decay, momentum, inside = group["weight_decay"], group["momentum"], group["variant"] in ("lr_inside", "google")
        s, r = (group["lr"], 1.0) if inside else (1.0, group["lr"])
        shared = dist.is_share(params[0])
        grads = [dist.own(p.grad) for p in params if p.grad is not None]
        params, buffers = [dist.own(p) for p in params], [dist.own(buffer) for buffer in buffers]
        d = list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads
        q = None
        if group["adapt"]:
            q = trust_ratios(params, grads, d, eta=group["eta"], decay=decay, variant=group["variant"], shared=shared)
        torch._foreach_mul_(buffers, momentum)
        add_scaled_(buffers, d, q, s)
        if group["nesterov"]:
            add_scaled_(params, d, q, -r * s)
            torch._foreach_add_(params, buffers, alpha=-r * momentum)
        else:
            torch._foreach_add_(params, buffers, alpha=-r)


def add_scaled_(targets: list[Tensor], changes: list[Tensor], ratios: list[Tensor] | None, alpha: float) -> None:
    """Add `alpha` x ratio x change to each target, without storing the products; no ratios are ratios of 1."""
    if ratios is None:
        torch._foreach_add_(targets, changes, alpha=alpha)
    else:
        torch._foreach_addcmul_(targets, changes, ratios, value=alpha)


def trust_ratios(
    params: list[Tensor],
    grads: list[Tensor],
    decayed: list[Tensor],
    *,
    eta: float,
    decay: float,
    variant: Variant,
    shared: bool,
) -> list[Tensor]:
    """The scalar q of `Lars` for each parameter; `decayed` are g + wd w. `shared`: all are shares of larger tensors."""
    weight = dist.norms(params, shared=shared)  # (number of parameters,)
    if variant in ("google", "lr_outside"):
        update = dist.norms(decayed, shared=shared)
        zero = (weight == 0) | (update == 0)
        q = (eta * weight / update).masked_fill(zero, 1.0)
    else:
        gradient = dist.norms(grads, shared=shared)
        q = eta * weight / (gradient + decay * weight + EPS)
        q = q.masked_fill(gradient == 0, 0.0 if variant == "larc" else 1.0).masked_fill(weight == 0, 1.0)
    return list(q.unbind())
