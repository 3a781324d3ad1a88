"""A thin, complete Mask2Former on top of `m2f_kernels`."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2f_kernels import __version__
    from m2f_model.config import Mask2FormerConfig
    from m2f_model.model import Mask2Former, Mask2FormerOutput
    from m2f_model.segment import Segmenter, segment_files
    from m2f_model.transformer_decoder import Prediction
    from m2f_model.weights import WeightsError

__all__ = [
    "Mask2Former",
    "Mask2FormerConfig",
    "Mask2FormerOutput",
    "Prediction",
    "Segmenter",
    "WeightsError",
    "__version__",
    "segment_files",
]

#: The modules of the public names. Names are imported at first access, so that `m2f --help` does not import PyTorch.
_HOMES = {
    "Mask2Former": "m2f_model.model",
    "Mask2FormerConfig": "m2f_model.config",
    "Mask2FormerOutput": "m2f_model.model",
    "Prediction": "m2f_model.transformer_decoder",
    "Segmenter": "m2f_model.segment",
    "WeightsError": "m2f_model.weights",
    "__version__": "m2f_kernels",
    "segment_files": "m2f_model.segment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'm2f_model' has no attribute {name!r}")
    if name != "__version__" and importlib.util.find_spec("transformers") is None:
        raise ImportError("m2f_model needs transformers and a few more packages: pip install 'm2f-kernels[model]'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
