"""topk_fx: every softmax(QK^T)V and FFN of a traced PyTorch model as an exact, chunked top-k op.

torch.compile(model, backend="topk", options={"k": 64})
new, report = topk_fx.rewrite(program, k=64)
"""

from . import errors, lowering, ops, reference, testing, vmap  # noqa: F401  (importing them registers the ops)
from .backend import clear_reports, reports
from .calibration import calibrate
from .config import TopKConfig
from .explain import explain
from .export import rewrite
from .functional import attention, ffn
from .report import RewriteReport, Site
from .screened_keys import ScreenedKeys

__all__ = [
    "RewriteReport",
    "ScreenedKeys",
    "Site",
    "TopKConfig",
    "attention",
    "calibrate",
    "clear_reports",
    "errors",
    "explain",
    "ffn",
    "reference",
    "reports",
    "rewrite",
    "testing",
]
__version__ = "0.1.0"
