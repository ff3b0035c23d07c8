"""How is an image looked at: description, host part, device part, and a slow reading to compare them with."""

from sslcli.views.augment import AugmentedCrops
from sslcli.views.build import build, build_eval
from sslcli.views.crops import CropViews
from sslcli.views.evaluation import EvalLook
from sslcli.views.kind import Seen, Views
from sslcli.views.masks import draw_masks
from sslcli.views.picture import Row, hidden, page, picture, rows_of

__all__ = [
    "AugmentedCrops",
    "CropViews",
    "EvalLook",
    "Row",
    "Seen",
    "Views",
    "build",
    "build_eval",
    "draw_masks",
    "hidden",
    "page",
    "picture",
    "rows_of",
]
