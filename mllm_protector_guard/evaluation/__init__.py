"""Measures harm detectors on labelled answers; needs the extra `train`."""

from mllm_protector_guard.evaluation.data import LabelledRow, read_labelled_rows
from mllm_protector_guard.evaluation.evaluate import Evaluation, evaluate, macro_mean
from mllm_protector_guard.evaluation.metrics import Interval, Metrics, measure

__all__ = [
    "Evaluation",
    "Interval",
    "LabelledRow",
    "Metrics",
    "evaluate",
    "macro_mean",
    "measure",
    "read_labelled_rows",
]
