"""A thin, complete Mask2Former on top of `m2f_kernels`."""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("m2f_model needs transformers and a few more packages: pip install 'm2f-kernels[model]'")

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
