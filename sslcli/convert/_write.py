"""What writers share: files that appear whole or not at all, and proofs that the network is still the same."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sslcli.config import choice
from sslcli.contracts import Backbone
from sslcli.convert._layout import Network
from sslcli.convert._rules import Rule, to_ours, to_theirs
from sslcli.errors import SslError, WeightsError

CLOSE = 1e-9
"""Largest difference of features, in double precision and relative to the largest feature, that is no difference."""
_STANDARD_RESNET = re.compile(r"resnet(18|34|50|101|152)(\.|$)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path`, file or folder, when all went well, and is gone when not.

    Raises:
        SslError: it cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SslError(f"cannot write `{path}`: {reason}", hint="free some space or name another place") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def kind_of(network: Network) -> str:
    """`resnet`, `vit` or `swin`, for those that other tools have too; otherwise the name the preset gives."""
    name = str(network.backbone.get("name"))
    if name != "timm":
        return name
    model = str(network.backbone.get("model"))
    if _STANDARD_RESNET.match(model):
        return "resnet"
    return next((kind for kind in ("vit", "swin") if model.startswith((f"{kind}_", f"deit_{kind}_"))), model)


def only(network: Network, tool: str, *kinds: str) -> str:
    """The kind of a network, which must be one of these.

    Raises:
        WeightsError: the tool has no place for it.
    """
    kind = kind_of(network)
    if kind not in kinds:
        named = str(network.backbone.get("model") or network.backbone.get("name"))
        raise WeightsError(
            f"{tool} has no place for a `{named}`: it takes {' or '.join(kinds)}",
            hint="`ssl convert timm` and `ssl convert onnx` take every network",
        )
    return kind


def standard_resnet(network: Network, tool: str, *, stem: str | None = "imagenet") -> int:
    """The depth of a ResNet that is built like torchvision's.

    Raises:
        WeightsError: it has another width, depth or stem (`stem` None takes any).
    """
    if network.backbone.get("name") == "timm":
        found = _STANDARD_RESNET.match(str(network.backbone["model"]))
        assert found is not None
        return int(found[1])
    said = {"depth": 50, "width": 64, "stem": "imagenet", **network.backbone}
    wrong = (
        f"depth {said['depth']}"
        if said["depth"] not in (18, 34, 50, 101, 152)
        else f"width {said['width']}"
        if said["width"] != 64
        else f"the stem `{said['stem']}`"
        if stem not in (None, said["stem"])
        else None
    )
    if wrong:
        raise WeightsError(
            f"{tool} has no ResNet with {wrong}",
            hint="`ssl convert onnx` takes every network",
        )
    return int(said["depth"])


def other_stem(trunk: Any) -> dict[str, nn.Module]:
    """What is to be put in place of the first layers of a standard ResNet: nothing, or a small convolution alone."""
    conv = trunk.conv1
    if conv.kernel_size == (7, 7):
        return {}
    fresh = nn.Conv2d(3, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    return {"conv1": fresh, "maxpool": nn.Identity()}


def built(network: Network) -> Backbone:
    """Our network with these tensors, in double precision, at rest.

    Raises:
        WeightsError: they do not fit it.
    """
    cfg = choice.config_of("sslcli.backbones", str(network.backbone.get("name"))).model_validate(network.backbone)
    backbone: Backbone = choice.build("sslcli.backbones", cfg)(cfg)
    try:
        backbone.trunk.load_state_dict(network.tensors)
    except RuntimeError as error:
        raise WeightsError(f"the tensors do not fit their network: {str(error).splitlines()[-1].strip()}") from error
    return backbone.double().eval().requires_grad_(False)


def side_of(network: Network) -> int:
    """Side of the images to compare on: the one that the network is made for, small where any will do."""
    said = network.backbone.get("image_size")
    size = int(said) if said else network.view.size
    return min(size, 96) if kind_of(network) == "resnet" else size


def images_for(network: Network) -> Tensor:
    """Two images of noise (2, 3, s, s) in double precision."""
    side = side_of(network)
    return torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4 - 2


@torch.no_grad()
def difference(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Largest difference of features, relative to the largest feature.

    Raises:
        SslError: it is one.
    """
    expected, found = ours(images), theirs(images)
    if expected.shape != found.shape:
        raise SslError(f"features have the shape {tuple(found.shape)} there and {tuple(expected.shape)} here")
    relative = float((expected - found).abs().max() / expected.abs().max())
    if not relative <= CLOSE:
        raise SslError(f"the converted network says something else: features differ by {relative:.2g}")
    return relative


def translated(network: Network, rules: Iterable[Rule], tool: str) -> dict[str, Tensor]:
    """The tensors under the names of another tool; read back, they are the same to the last bit.

    Raises:
        WeightsError: there are tensors that the tool has no name for.
        SslError: the rules lose something.
    """
    table = tuple(rules)
    there = to_theirs(table, network.tensors)
    if there.unexpected:
        raise WeightsError(
            f"{tool} has no place for `{there.unexpected[0]}`"
            + (f" and {len(there.unexpected) - 1} more tensors" if len(there.unexpected) > 1 else ""),
            hint="`ssl convert timm` and `ssl convert onnx` take every network",
        )
    same(network.tensors, to_ours(table, there.tensors).tensors)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in there.tensors.items()}


def same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """See that two sets of tensors agree to the last bit.

    Raises:
        SslError: they do not.
    """
    if expected.keys() != found.keys():
        raise SslError(f"`{min(expected.keys() ^ found.keys())}` is lost on the way there and back")
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor.cpu()):
            raise SslError(f"`{name}` is not the same after the way there and back")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, below: str | None = None) -> None:
    """Write tensors as safetensors or, below a key or with another suffix, as torch does.

    Raises:
        SslError: the file cannot be written.
    """
    kept: dict[str, Any] = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            if below is not None:
                raise WeightsError(f"`{path.name}`: such a file holds a dictionary of tensors", hint="call it `….pth`")
            save_file(kept, temporary, metadata={"format": "pt"})
        else:
            torch.save(kept if below is None else {below: kept}, temporary)


def suffixed(path: Path, *suffixes: str) -> Path:
    """The path, which must end in one of these.

    Raises:
        WeightsError: it does not.
    """
    if path.suffix not in suffixes:
        raise WeightsError(
            f"`{path}` must end in {' or '.join(f'`{suffix}`' for suffix in suffixes)}",
            hint=f"e.g. `{path.with_suffix(suffixes[0])}`",
        )
    return path
