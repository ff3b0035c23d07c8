"""From a description of views to what draws them: the one place that tells the kinds apart."""

from sslcli.config.views import AnyViews, Crops, EvalView, Masked, Patches, Rotations
from sslcli.views.crops import CropViews
from sslcli.views.evaluation import EvalLook
from sslcli.views.kind import Views
from sslcli.views.masked import MaskedViews
from sslcli.views.patches import PatchViews
from sslcli.views.rotations import RotationViews


def build(cfg: AnyViews, seed: int) -> Views:
    """The views a run with this seed trains on."""
    match cfg:
        case Crops():
            return CropViews(cfg, seed)
        case Rotations():
            return RotationViews(cfg, seed)
        case Patches():
            return PatchViews(cfg, seed)
        case Masked():
            return MaskedViews(cfg, seed)


def build_eval(cfg: EvalView) -> EvalLook:
    """The one view that evaluation and extraction use."""
    return EvalLook(cfg)
