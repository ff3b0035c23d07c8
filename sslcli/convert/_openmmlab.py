"""What the toolboxes of OpenMMLab share: a ResNet under torchvision's names below `state_dict`."""

from pathlib import Path

from sslcli.convert._layout import Network, Written
from sslcli.convert._write import only, same, standard_resnet, suffixed, write_tensors


def resnet_for(tool: str, network: Network, out: Path, notes: tuple[str, ...]) -> Written:
    """A file that `init_cfg` of the toolbox's ResNet takes.

    Raises:
        WeightsError: the network is none that the toolbox builds, or the file is not called `.pth`.
        SslError: the file cannot be written, or does not hold what was written.
    """
    import torch

    suffixed(out, ".pth")
    only(network, tool, "resnet")
    depth = standard_resnet(network, tool)
    write_tensors(out, network.tensors, below="state_dict")
    same(network.tensors, torch.load(out, weights_only=True)["state_dict"])
    return Written(
        out,
        len(network.tensors),
        proof="read back, every tensor is the same to the last bit; the names are the toolbox's own",
        missing=("everything but the backbone: it is learned",),
        use=(
            "backbone=dict(",
            '    type="ResNet",',
            f"    depth={depth},",
            '    style="pytorch",  # the stride is in the 3 x 3 convolution',
            '    norm_cfg=dict(type="SyncBN", requires_grad=True),',
            "    norm_eval=False,",
            f'    init_cfg=dict(type="Pretrained", checkpoint="{out}"),',
            ")",
        ),
        notes=(pixels(network), *notes),
    )


def pixels(network: Network) -> str:
    """How the data preprocessor is to be set."""
    mean, std = (
        [round(255 * value, 4) for value in values]
        for values in (network.view.normalize.mean, network.view.normalize.std)
    )
    return f"data preprocessor: mean={mean}, std={std}, bgr_to_rgb=True (before version 3: to_rgb=True)"
