"""ONNX (https://onnx.ai): the whole network, images in, pooled features out, for any number of images at a time."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli.contracts import Backbone
from sslcli.convert._layout import Network, Written
from sslcli.convert._write import built, replacing, side_of, suffixed
from sslcli.errors import SslError, UserError, WeightsError

OPSET = 18
"""Version of the set of operators."""
CLOSE = 1e-4
"""Largest difference of features, in single precision and relative to the largest feature, that is no difference."""


def write(network: Network, out: Path) -> Written:
    """One file with graph and weights: `images` (B, 3, s, s) float32 to `features` (B, dim).

    Raises:
        WeightsError: the network cannot be written as a graph, or the file is not called `.onnx`.
        UserError: a package that is needed is not installed.
        SslError: the file cannot be written, or the graph says something else.
    """
    suffixed(out, ".onnx")
    lacking = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if lacking:
        raise UserError(f"`{lacking[0]}` is not installed, and ONNX needs it", hint="pip install 'sslcli[onnx]'")
    backbone = built(network).float()
    side = network.view.size if network.backbone.get("name") == "resnet" else side_of(network)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with replacing(out) as temporary:
        _export(backbone, images, temporary)
        difference = _difference(backbone, images[:1], temporary)
    return Written(
        out,
        len(network.tensors),
        proof="onnxruntime gives the same features of an image, in single precision"
        if difference is not None
        else "not run: onnxruntime is not installed here (pip install 'sslcli[onnx]')",
        difference=difference,
        use=(
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{out}")',
            'features = session.run(["features"], {"images": images})[0]',
        ),
        notes=(
            f"operators of opset {OPSET}; images (B, 3, {side}, {side}) float32, "
            f"(x / 255 - {list(network.view.normalize.mean)}) / {list(network.view.normalize.std)}.",
        ),
    )


def _export(backbone: Backbone, images: Tensor, file: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                backbone,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
            program.save(str(file), external_data=False)
    except OSError:
        raise
    except Exception as error:  # the exporter raises whatever the part that failed raises
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WeightsError(f"the network cannot be written as a graph: {first}") from error
    finally:
        logger.setLevel(level)


def _difference(backbone: Backbone, images: Tensor, file: Path) -> float | None:
    """Largest difference of features on a batch of another size than the exported one, None without onnxruntime.

    Raises:
        SslError: it is more than rounding.
    """
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
    with torch.no_grad():
        expected = backbone(images)
    relative = float((expected - found).abs().max() / expected.abs().max())
    if not relative <= CLOSE:
        raise SslError(f"the graph says something else: features differ by {relative:.2g}")
    return relative
