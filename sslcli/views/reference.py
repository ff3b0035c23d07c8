"""The slow reading of a view: one image at a time with PIL, step by step what torchvision does to PIL images."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from sslcli.config.views import Interpolation, Normalize
from sslcli.seeds import F32
from sslcli.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, Boxes, Colours

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def resized_crop(image: Image.Image, box: Boxes, size: int, interpolation: Interpolation) -> Image.Image:
    """Crop to the only box, resize to `size` squared, mirror."""
    top, left, height, width = (int(n[0]) for n in (box.top, box.left, box.height, box.width))
    image = image.crop((left, top, left + width, top + height)).resize((size, size), FILTERS[interpolation])
    return ImageOps.mirror(image) if box.flip[0] else image


def recoloured(image: Image.Image, draws: Colours) -> Image.Image:
    """Grey, jitter, grey, blur, solarize by the only row of `draws`."""
    if draws.grey_first[0]:
        image = grey(image)
    for operation in draws.order[0]:
        image = jittered(image, int(operation), float(draws.factors[0, operation]))
    if draws.grey[0]:
        image = grey(image)
    if draws.blur[0]:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(draws.sigma[0])))
    if draws.solarize[0]:
        image = ImageOps.solarize(image, threshold=int(draws.threshold[0]))
    return image


def jittered(image: Image.Image, operation: int, factor: float) -> Image.Image:
    """One jitter operation."""
    if operation == BRIGHTNESS:
        return ImageEnhance.Brightness(image).enhance(factor)
    if operation == CONTRAST:
        return ImageEnhance.Contrast(image).enhance(factor)
    if operation == SATURATION:
        return ImageEnhance.Color(image).enhance(factor)
    if operation == HUE:
        return _hue_turned(image, factor)
    return image


def grey(image: Image.Image) -> Image.Image:
    """Three equal channels of luma."""
    return image.convert("L").convert("RGB")


def standardised(image: Image.Image, normalize: Normalize) -> F32:
    """(x / 255 - mean) / std as (3, h, w)."""
    values = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(numbers, dtype=np.float32)[:, None, None] for numbers in (normalize.mean, normalize.std))
    return np.asarray((values - mean) / std, dtype=np.float32)


def _hue_turned(image: Image.Image, turns: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    shifted = (np.asarray(h).astype(np.int64) + int(turns * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), s, v)).convert("RGB")
