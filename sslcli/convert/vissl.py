"""VISSL: the trunk below `classy_state_dict`, with torchvision's names behind `_feature_blocks`."""

from sslcli.convert._layout import Facts, Layout, Part, Tensors
from sslcli.convert.torchvision import RESNET

_LOSSES = {
    "simclr_info_nce_loss": "simclr", "swav_loss": "swav", "moco_loss": "moco", "barlow_twins_loss": "barlowtwins",
    "nce_loss_with_memory": "npid", "dino_loss": "dino", "deepclusterv2_loss": "deepclusterv2",
}  # fmt: skip


def _method(tensors: Tensors, facts: Facts) -> str:
    return _LOSSES.get(str(facts.get("loss.name", "config.LOSS.name")), "unknown")


LAYOUTS = (
    Layout(
        "vissl", "VISSL",
        (
            Part(
                "student",
                ("trunk._feature_blocks.", "trunk.base_model._feature_blocks.",
                 "base_model.model.trunk._feature_blocks.", "_feature_blocks."),
                "trunk",
            ),
        ),
        (RESNET,), signs=(r"(base_model\.model\.)?(trunk\.)?(base_model\.)?_feature_blocks\.",),
        beside=(r"heads\.", r"loss\.", r"base_model\.model\.heads\.", r"base_model\.meta\.", r"meta\."), method=_method,
    ),
)  # fmt: skip
