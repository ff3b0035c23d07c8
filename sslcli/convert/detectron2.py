"""detectron2 (https://github.com/facebookresearch/detectron2): a ResNet for detection and segmentation."""

import pickle
from pathlib import Path
from typing import Any, final

import numpy as np

from sslcli.convert._layout import Dialect, Layout, Network, Part, Written
from sslcli.convert._rules import drop, rename
from sslcli.convert._write import only, replacing, standard_resnet, suffixed, translated

RULES = (
    rename("stem.conv1.weight", "conv1.weight"),
    rename("stem.conv1.norm.{leaf}", "bn1.{leaf}"),
    rename("res{s+1}.{b}.conv{c}.weight", "layer{s}.{b}.conv{c}.weight"),
    rename("res{s+1}.{b}.conv{c}.norm.{leaf}", "layer{s}.{b}.bn{c}.{leaf}"),
    rename("res{s+1}.{b}.shortcut.weight", "layer{s}.{b}.downsample.0.weight", optional=True),
    rename("res{s+1}.{b}.shortcut.norm.{leaf}", "layer{s}.{b}.downsample.1.{leaf}", optional=True),
    drop("stem.fc.{rest}", "projection head, which MoCo's own converter carries along"),
)
LAYOUTS = (
    Layout(
        "detectron2", "detectron2", (Part("student", ("backbone.bottom_up.", "backbone.", ""), "backbone"),),
        (
            Dialect(
                "detectron2 ResNet", "resnet",
                ("stem.conv1.weight", "stem.conv1.norm.running_mean", "res2.0.conv1.weight", "res5.0.conv1.weight"),
                RULES,
            ),
        ),
        beside=(
            r"proposal_generator\.", r"roi_heads\.", r"backbone\.fpn_", r"anchor_generator\.", r"pixel_", r"head\.",
        ),
    ),
)  # fmt: skip


def write(network: Network, out: Path) -> Written:
    """A pickle of arrays under detectron2's names, as `MODEL.WEIGHTS` takes it.

    Raises:
        WeightsError: the network is no ResNet that detectron2 builds, or the file is not called `.pkl`.
        SslError: the file cannot be written.
    """
    suffixed(out, ".pkl")  # what detectron2 goes by
    only(network, "detectron2", "resnet")
    depth = standard_resnet(network, "detectron2")
    tensors = translated(network, RULES, "detectron2")
    content = {
        "model": {name: tensor.numpy() for name, tensor in tensors.items()},
        "__author__": "ssl",
        "matching_heuristics": True,  # names are matched by their ends: the model's begin with `backbone.bottom_up.`
    }
    with replacing(out) as temporary, temporary.open("wb") as file:
        _Pickler(file, protocol=4).dump(content)
    mean, std = (
        [round(255 * value, 4) for value in values]
        for values in (network.view.normalize.mean, network.view.normalize.std)
    )
    return Written(
        out,
        len(tensors),
        proof="read back under our names, every tensor is the same to the last bit",
        missing=("the heads (FPN, RPN, ROI): they are learned",),
        use=(
            "MODEL:",
            f'  WEIGHTS: "{out}"',
            f"  PIXEL_MEAN: {mean}",
            f"  PIXEL_STD: {std}",
            "  RESNETS:",
            f"    DEPTH: {depth}",
            *(("    RES2_OUT_CHANNELS: 64",) if depth in (18, 34) else ()),
            "    STRIDE_IN_1X1: False",
            '    NORM: "SyncBN"',
            "  BACKBONE:",
            "    FREEZE_AT: 0",
            "INPUT:",
            '  FORMAT: "RGB"',
        ),
        notes=(
            "detectron2's own defaults are for other weights: pixels in BGR, not divided by their deviation, and the "
            "stride in the 1 x 1 convolution. With them these weights load without a word and detect badly.",
            "self-supervised weights have no frozen statistics to rely on: train batch norm (SyncBN), in C4 models "
            "also after res5.",
        ),
    )


@final
class _Pickler(pickle.Pickler):
    """Arrays written so that every version of NumPy reads them: those of NumPy 2 name a module that 1.x lacks."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented
