"""solo-learn: Lightning checkpoints with `backbone`, often `momentum_backbone`, and a classifier on the side."""

from dataclasses import replace

from sslcli.convert._layout import Facts, Inferred, Layout, Part, Tensors
from sslcli.convert.timm import SWIN, VIT
from sslcli.convert.torchvision import RESNET

_KNOWN = ("barlow_twins", "byol", "dino", "mae", "mocov2plus", "mocov3", "nnclr", "simclr", "simsiam", "supcon", "swav",
          "vicreg", "wmse", "deepclusterv2", "ressl", "nnbyol", "vibcreg", "all4one", "mocov2")  # fmt: skip
_OURS = {"barlow_twins": "barlowtwins", "mocov2plus": "moco", "mocov2": "moco"}


def _method(tensors: Tensors, facts: Facts) -> str:
    told = facts.get("hyper_parameters.method", "hyper_parameters.cfg.method")
    return _OURS.get(told, told) if isinstance(told, str) and told in _KNOWN else "unknown"


def _padded(found: Inferred, method: str) -> Inferred:
    """The CIFAR networks of solo-learn pad the first convolution by 2 and do not pool after it."""
    if found.backbone.get("stem") != "cifar":
        return found
    return replace(found, backbone={**found.backbone, "stem": "padded"}, notes=())


LAYOUTS = (
    Layout(
        "sololearn", "solo-learn",
        (
            Part("student", ("backbone.",), "backbone"),
            Part("teacher", ("momentum_backbone.",), "momentum backbone"),
        ),
        (RESNET, VIT, SWIN), signs=(r"backbone\.", r"(momentum_)?classifier\.|momentum_projector\."),
        never=(r"neck\.",),
        beside=(
            r"(momentum_)?(classifier|projector|predictor|head|prototypes|dino_loss_func)", r"queue", r"decoder",
            r"mask_token", r"dino_loss", r"whitening", r"padding",
        ),
        method=_method,
        settings=_padded,
    ),
)  # fmt: skip
