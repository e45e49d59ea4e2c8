"""The one place that imports torchvision: `from common.vision import torchvision`.

A CPU-only torch beside the package index's torchvision (a CUDA build) cannot load torchvision's compiled library, and
the import then fails with "operator torchvision::nms does not exist", although models and transforms need no compiled
code at all. So try the library first; only where it cannot be loaded declare the two operators that torchvision
describes at import time. They have a signature and no kernel: calling nms still fails, everything else works.
Where torchvision is whole this file does nothing.
"""

import glob
import importlib.util
import os

import torch


def _declare_missing_operators() -> list:
    """Returns the torch.library handle if operators had to be declared (it must stay alive), else an empty list."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        raise ImportError("torchvision is not installed; run: pip install -r requirements.txt")
    try:
        for path in glob.glob(os.path.join(os.path.dirname(spec.origin), "_C*")):
            torch.ops.load_library(path)
    except (OSError, RuntimeError):
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return []
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


_KEEP = _declare_missing_operators()

import torchvision  # noqa: E402, F401
