"""BEiT, data2vec and CAE as written by their authors on one code base: microsoft/unilm, data2vec_vision, CAE."""

from sslcli.convert._layout import BICUBIC, HALF, Facts, Layout, Part, Tensors
from sslcli.convert.timm import BEIT


def _method(tensors: Tensors, facts: Facts) -> str:
    head = tensors.get("lm_head.weight")
    return "data2vec" if head is not None and head.shape[0] == head.shape[1] else "beit"


_CAE = (r"regresser\.", r"pretext_neck\.", r"decoder\.", r"rd_pos_embed", r"mask_token", r"lm_head", r"norm2?\.")
LAYOUTS = (
    Layout(
        "beit", "BEiT (microsoft/unilm) or data2vec (facebookresearch/data2vec_vision)",
        (Part("student", ("",), "network"),), (BEIT,), signs=(r"lm_head\.", r"blocks\."), method=_method, view=HALF,
    ),
    Layout(
        "cae", "CAE (lxtGH/CAE, Atten4Vis/CAE)",
        (
            Part("student", ("encoder.",), "encoder"),
            Part("teacher", ("teacher.", "alignment_encoder."), "encoder that the targets come from"),
        ),
        (BEIT,), signs=(r"encoder\.blocks\.", r"(regresser|pretext_neck)\."), beside=_CAE, method="cae", view=BICUBIC,
    ),
)  # fmt: skip
