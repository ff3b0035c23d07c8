"""The encoder of DALL-E's discrete autoencoder: an image as a grid of words (Ramesh et al. 2021, appendix A).

Weights are always a user's file; no code of that file is ever run.
"""

import hashlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli.errors import WeightsError

STRIDE = 8
"""Side in pixels of the square that one word describes."""
HINT = (
    "the encoder of OpenAI's DALL-E is at https://cdn.openai.com/dall-e/encoder.pkl, MMSelfSup's copy at "
    "https://download.openmmlab.com/mmselfsup/cae/dalle_encoder.pth; either file will do"
)
GROUPS = 4
MOST_DEEP = 16  # of modules in modules; the encoder has 5


@final
class Encoder(nn.Module):
    """Residual convolutions and three halvings of the side, under the names of OpenAI's code.

    On a GPU all layers but the last compute in fp16, as the original does.
    """

    def __init__(self, hidden: int = 256, blocks: int = 2, words: int = 8192) -> None:
        super().__init__()
        self.words = words
        parts: dict[str, nn.Module] = {"input": Conv(3, hidden, 7)}
        width = hidden
        for number in range(GROUPS):
            wider = hidden * 2**number
            group: dict[str, nn.Module] = {}
            for block in range(blocks):
                group[f"block_{block + 1}"] = Block(width, wider, layers=GROUPS * blocks)
                width = wider
            if number < GROUPS - 1:
                group["pool"] = nn.MaxPool2d(2)
            parts[f"group_{number + 1}"] = nn.Sequential(OrderedDict(group))
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(width, words, 1)))
        self.blocks = nn.Sequential(OrderedDict(parts))

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, words, H // 8, W // 8), float32, of images (B, 3, H, W) with values in [0, 1]."""
        *body, last = self.blocks
        x = 0.8 * images.float() + 0.1  # away from the ends, which the logit-Laplace density does not have
        with torch.autocast(images.device.type, torch.float16, enabled=images.is_cuda):
            for part in body:
                x = part(x)
        with torch.autocast(images.device.type, enabled=False):
            scores: Tensor = last(x.float())
        return scores

    @torch.no_grad()
    def words_of(self, images: Tensor) -> Tensor:
        """The likeliest words (B, N), int64, of the squares in row-major order."""
        words: Tensor = self(images).argmax(dim=1).flatten(1)
        return words


@final
class Block(nn.Module):
    """Four convolutions that are added to the input with a small weight."""

    def __init__(self, width: int, wider: int, layers: int) -> None:
        super().__init__()
        narrow = wider // 4
        self.gain = 1 / layers**2
        self.id_path = Conv(width, wider, 1) if width != wider else nn.Identity()
        path: dict[str, nn.Module] = {}
        for number, (wide_in, wide_out, side) in enumerate(
            ((width, narrow, 3), (narrow, narrow, 3), (narrow, narrow, 3), (narrow, wider, 1)), start=1
        ):
            path |= {f"relu_{number}": nn.ReLU(), f"conv_{number}": Conv(wide_in, wide_out, side)}
        self.res_path = nn.Sequential(OrderedDict(path))

    def forward(self, x: Tensor) -> Tensor:
        """(B, wider, h, w) from (B, width, h, w)."""
        y: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return y


@final
class Conv(nn.Module):
    """A convolution that keeps the size; weight and bias are called `w` and `b`."""

    def __init__(self, wide_in: int, wide_out: int, side: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(wide_out, wide_in, side, side).normal_(std=(wide_in * side**2) ** -0.5))
        self.b = nn.Parameter(torch.zeros(wide_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, out, h, w) from (B, in, h, w)."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


def read_encoder(path: Path) -> Encoder:
    """The frozen encoder in a file: OpenAI's `encoder.pkl`, or a dictionary of its tensors (pickled or safetensors).

    Raises:
        WeightsError: the file is missing, damaged, holds something else, or asks for more than tensors.
    """
    tensors = read_tensors(path)
    try:
        hidden, words = len(tensors["blocks.input.w"]), len(tensors["blocks.output.conv.w"])
        numbers = [found[1] for name in tensors if (found := re.match(r"blocks\.group_1\.block_(\d+)\.", name))]
        encoder = Encoder(hidden, max(map(int, numbers)), words)
        encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"`{path}` does not hold the encoder of DALL-E's autoencoder", hint=HINT) from error
    return encoder.eval().requires_grad_(False)


def digest_of(module: nn.Module) -> bytes:
    """SHA-256 (32 bytes) over the names and values of a module's tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.digest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a state dict, or from a whole pickled module of which nothing but its tensors is believed.

    Raises:
        WeightsError: the file is missing, damaged, or asks for more than tensors.
    """
    if not path.is_file():
        raise WeightsError(f"no tokenizer `{path}`", hint=HINT)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([(Hull, name) for name in HULLS]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        return dict(tensors_in(found) if isinstance(found, Hull) else named(found))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it asks for `{wanted[1]}`, and only tensors are read from it" if wanted else "it is no pickle of tensors"
        )
        raise WeightsError(f"cannot read tokenizer `{path}`: {why}", hint=HINT) from error
    except Exception as error:  # a hostile file may break the reader in any way
        raise WeightsError(
            f"cannot read tokenizer `{path}`: it is damaged or another kind of file", hint=HINT
        ) from error


class Hull:
    """Stands for a module of the pickled encoder: holds what the file says it holds, and does nothing."""


HULLS = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
)
"""Classes that OpenAI's file names; none of them is imported."""


def tensors_in(hull: Hull, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module and of those inside it, by dotted name.

    Raises:
        ValueError: modules are nested without end.
    """
    if depth > MOST_DEEP:
        raise ValueError("modules are nested too deeply")
    held = vars(hull)
    for store in (held["_parameters"], held["_buffers"]):
        yield from named({f"{prefix}{name}": tensor for name, tensor in store.items() if tensor is not None})
    for name, part in held["_modules"].items():
        if not isinstance(part, Hull):
            raise TypeError(f"`{prefix}{name}` is not a module")
        yield from tensors_in(part, f"{prefix}{name}.", depth + 1)


def named(found: object) -> Iterator[tuple[str, Tensor]]:
    """The entries of a dictionary of tensors.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(found, dict):
        raise TypeError("not a dictionary")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError("not a dictionary of tensors")
        yield name, tensor.detach()
