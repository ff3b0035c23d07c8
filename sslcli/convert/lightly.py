"""lightly: modules of its examples and benchmarks, with `projection_head` and momentum twins beside `backbone`."""

from collections.abc import Iterable

from sslcli.convert._layout import Dialect, Facts, Layout, Part, Tensors
from sslcli.convert._rules import Rule, drop, rename
from sslcli.convert.simclr import BARE, WHOLE, WITHOUT_POOL
from sslcli.convert.timm import VIT
from sslcli.convert.torchvision import RESNET
from sslcli.convert.torchvision import VIT as VIT_TORCHVISION

OWN = Dialect(
    "lightly's own ResNet", "resnet", ("0.weight", "1.running_mean", "2.0.conv1.weight", "3.0.shortcut.0.weight"),
    (
        rename("0.weight", "conv1.weight"),
        rename("1.{leaf}", "bn1.{leaf}"),
        *(
            rule
            for n in range(1, 5)
            for rule in (
                rename(f"{n + 1}.{{b}}.shortcut.{{rest}}", f"layer{n}.{{b}}.downsample.{{rest}}", optional=True),
                rename(f"{n + 1}.{{b}}.{{rest}}", f"layer{n}.{{b}}.{{rest}}"),
            )
        ),
    ),
)  # fmt: skip


def _wrapped(rules: Iterable[Rule], head: str) -> tuple[Rule, ...]:
    """The same rules behind `vit.`, as in lightly's masked transformers."""
    kept = (rename(f"vit.{rule.theirs[0]}", rule.ours, optional=rule.optional) for rule in rules if rule.ours)
    return (*kept, drop(f"vit.{head}.{{rest}}", "classifier"), drop("mask_token", "stands for hidden patches"))


VIT_WRAPPED = Dialect(
    "torchvision ViT in lightly", "vit", ("vit.class_token", "vit.conv_proj.weight"),
    _wrapped(VIT_TORCHVISION.rules, "heads"),
)  # fmt: skip
VIT_TIMM = Dialect(
    "timm ViT in lightly", "vit", ("vit.pos_embed", "vit.patch_embed.proj.weight"), _wrapped(VIT.rules, "head"),
    after=VIT.after,
)  # fmt: skip
_ALL = (RESNET, VIT, VIT_TORCHVISION, OWN, WHOLE, BARE, WITHOUT_POOL, VIT_WRAPPED, VIT_TIMM)


def _method(tensors: Tensors, facts: Facts) -> str:
    names = tuple(tensors)

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if has("prototypes."):
        return "swav"
    if has("teacher_head.", "student_head."):
        return "dino"
    if has("decoder."):
        return "mae"
    if has("prediction_head."):
        return "byol" if has("backbone_momentum.", "projection_head_momentum.") else "simsiam"
    if has("backbone_momentum."):
        return "moco"
    return "unknown"  # SimCLR, Barlow Twins and VICReg differ in nothing but the loss


LAYOUTS = (
    Layout(
        "lightly", "lightly",
        (
            Part("student", ("backbone.", "student_backbone."), "backbone"),
            Part("teacher", ("backbone_momentum.", "teacher_backbone."), "momentum backbone"),
        ),
        _ALL,
        signs=(
            r"(student_|teacher_)?backbone\.",
            r"(projection_head|prediction_head|student_head|teacher_head|backbone_momentum|decoder\.decoder)",
        ),
        beside=(
            r"(projection|prediction|student|teacher)_head", r"prototypes", r"criterion", r"decoder", r"mask_token",
            r"online_classifier", r"queue", r"ntx_ent_loss", r"memory_bank",
        ),
        method=_method,
    ),
)  # fmt: skip
