"""Measures harm detectors on labelled answers; needs the extra `train`."""

from mllm_protector_guard.evaluation.bury import BuriedRow, bury
from mllm_protector_guard.evaluation.data import LabelledRow, read_labelled_rows
from mllm_protector_guard.evaluation.evaluate import (
    Evaluation,
    evaluate,
    evaluate_buried,
    evaluate_perturbed,
    macro_mean,
)
from mllm_protector_guard.evaluation.metrics import Interval, Metrics, measure
from mllm_protector_guard.evaluation.perturb import PERTURBATIONS, perturb, perturb_row
from mllm_protector_guard.evaluation.robustness import Buried, Perturbed

__all__ = [
    "PERTURBATIONS",
    "Buried",
    "BuriedRow",
    "Evaluation",
    "Interval",
    "LabelledRow",
    "Metrics",
    "Perturbed",
    "bury",
    "evaluate",
    "evaluate_buried",
    "evaluate_perturbed",
    "macro_mean",
    "measure",
    "perturb",
    "perturb_row",
    "read_labelled_rows",
]
