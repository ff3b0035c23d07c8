"""SimCLR's ports to PyTorch: sthalles/SimCLR, Spijkervet/SimCLR, HobbitLong/SupContrast, leftthomas/SimCLR."""

from sslcli.convert._layout import Dialect, Layout, Part
from sslcli.convert._rules import Rule, drop, rename
from sslcli.convert.torchvision import RESNET


def in_a_row(conv: int, bn: int, first: int) -> tuple[Rule, ...]:
    """A ResNet as an `nn.Sequential` of its children: numbers of the first convolution, its norm, the first stage."""
    stages = [rename(f"{first + n}.{{b}}.{{rest}}", f"layer{n + 1}.{{b}}.{{rest}}") for n in range(4)]
    return (
        rename(f"{conv}.weight", "conv1.weight"),
        rename(f"{bn}.{{leaf}}", "bn1.{leaf}"),
        *stages,
        drop("fc.{rest}", "classifier or projection head"),
    )


def row(conv: int, bn: int, first: int) -> Dialect:
    """The dialect of such a row."""
    anchors = (f"{conv}.weight", f"{bn}.running_mean", f"{first}.0.conv1.weight", f"{first + 3}.0.conv1.weight")
    return Dialect("ResNet in a row", "resnet", anchors, in_a_row(conv, bn, first))


WHOLE, WITHOUT_POOL, BARE = row(0, 1, 4), row(0, 1, 3), row(0, 1, 2)
"""Children with activation and pooling, without pooling, and without either."""

LAYOUTS = (
    Layout(
        "simclr", "SimCLR (sthalles/SimCLR)", (Part("student", ("backbone.",), "backbone"),), (RESNET,),
        signs=(r"backbone\.fc\.0\.", r"backbone\.fc\.2\."), method="simclr",
    ),
    Layout(
        "simclr", "SimCLR (Spijkervet/SimCLR)", (Part("student", ("encoder.",), "encoder"),), (RESNET,),
        signs=(r"encoder\.conv1", r"projector\.[02]\."), never=(r"predictor",), beside=(r"projector\.",),
        method="simclr",
    ),
    Layout(
        "simclr", "SimCLR or SupCon (HobbitLong/SupContrast)", (Part("student", ("encoder.",), "encoder"),), (RESNET,),
        signs=(r"encoder\.conv1", r"head\.([02]\.)?weight"), beside=(r"head\.",), method="simclr",
    ),
    Layout(
        "simclr", "SimCLR (leftthomas/SimCLR)", (Part("student", ("f.",), "encoder"),), (WITHOUT_POOL, WHOLE),
        signs=(r"f\.0\.weight",), beside=(r"g\.",), method="simclr",
    ),
)  # fmt: skip
