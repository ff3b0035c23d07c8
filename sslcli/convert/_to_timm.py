"""To timm: every network, whose names are timm's already."""

from pathlib import Path
from typing import Any

from torch import nn

from sslcli.convert._layout import Network, Written
from sslcli.convert._write import built, difference, images_for, other_stem, suffixed, write_tensors
from sslcli.errors import WeightsError


def write(network: Network, out: Path) -> Written:
    """A state dict under timm's names, and the call of timm that makes its network.

    Raises:
        WeightsError: timm has no function for this network.
        SslError: the file cannot be written, or the network there says something else.
    """
    import timm

    suffixed(out, ".safetensors", ".pth", ".pt")
    ours = built(network)
    model, settings, changes = _call(network, ours.trunk)
    theirs: Any = timm.create_model(model, num_classes=0, **settings)
    for name, layer in changes.items():
        setattr(theirs, name, layer)
    try:
        theirs.load_state_dict(network.tensors)
    except RuntimeError as error:
        raise WeightsError(f"timm's `{model}` is another network: {str(error).splitlines()[-1].strip()}") from error
    gap = difference(ours, theirs.double().eval(), images_for(network))
    write_tensors(out, network.tensors)
    return Written(
        out,
        len(network.tensors),
        proof="timm's own network gives the same features of two images, in double precision",
        difference=gap,
        use=lines(network, ours.trunk, out),
    )


def lines(network: Network, trunk: Any, file: Path) -> tuple[str, ...]:
    """What to type to have the network from a file of its tensors.

    Raises:
        WeightsError: timm has no function for this network.
    """
    model, settings, changes = _call(network, trunk)
    words = "".join(f", {key}={value!r}" for key, value in settings.items())
    load = "safetensors.torch.load_file" if file.suffix == ".safetensors" else "torch.load"
    return (
        "import safetensors.torch, timm, torch",
        f'network = timm.create_model("{model}", num_classes=0{words})',
        *(f"network.{name} = torch.nn.{layer!r}" for name, layer in changes.items()),
        f'network.load_state_dict({load}("{file}"))',
    )


def _call(network: Network, trunk: Any) -> tuple[str, dict[str, Any], dict[str, nn.Module]]:
    """Name and settings of timm's function, and what is to be replaced in what it makes."""
    said = network.backbone
    match said["name"]:
        case "timm":
            size = {"img_size": said["image_size"]} if said.get("image_size") else {}
            return said["model"], {**size, **(said.get("args") or {})}, {}
        case "resnet":
            return _resnet(network, trunk)
        case "vit":
            block, embed = trunk.blocks[0], trunk.patch_embed
            wanted = {
                "patch_size": embed.patch_size[0], "embed_dim": trunk.embed_dim, "depth": len(trunk.blocks),
                "num_heads": block.attn.num_heads,
            }  # fmt: skip
            model, own = _nearest_vit(wanted)
            settings = {key: value for key, value in wanted.items() if value != own[key]}
            if embed.img_size[0] != 224:
                settings["img_size"] = embed.img_size[0]
            if said.get("pool") == "mean":
                settings |= {"global_pool": "avg", "fc_norm": False}
            return model, settings, {}
        case "swin" if said.get("positions", "none") == "none":
            settings = {
                "img_size": trunk.patch_embed.img_size[0], "patch_size": trunk.patch_embed.patch_size[0],
                "window_size": said.get("window", 7),
                "embed_dim": trunk.embed_dim, "depths": tuple(len(stage.blocks) for stage in trunk.layers),
                "num_heads": tuple(stage.blocks[0].attn.num_heads for stage in trunk.layers),
            }  # fmt: skip
            return "swin_tiny_patch4_window7_224", settings, {}
        case _:
            raise WeightsError(
                f"timm has no function for the backbone `{said['name']}` as it is set here",
                hint="`ssl extract-backbone` writes the tensors under timm's names all the same",
            )


_VITS = {
    "vit_tiny_patch16_224": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small_patch16_224": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base_patch16_224": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16_224": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _nearest_vit(wanted: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Timm's function that needs the fewest settings."""
    model = min(_VITS, key=lambda name: sum(wanted[key] != value for key, value in _VITS[name].items()))
    return model, _VITS[model]


def _resnet(network: Network, trunk: Any) -> tuple[str, dict[str, Any], dict[str, nn.Module]]:
    said = {"depth": 50, "width": 64, **network.backbone}
    depth, width = said["depth"], said["width"]
    if width != 64 or depth not in (18, 26, 34, 50, 101, 152):
        raise WeightsError(
            f"timm has no ResNet of depth {depth} and width {width} with one convolution in its stem",
            hint="`ssl convert onnx` takes every network",
        )
    return f"resnet{depth}", {}, other_stem(trunk)
