"""How is an image looked at: description, host part, device part, and a slow reading to compare them with."""

from sslcli.views.build import CropViews, EvalLook, build, build_eval
from sslcli.views.picture import picture

__all__ = ["CropViews", "EvalLook", "build", "build_eval", "picture"]
