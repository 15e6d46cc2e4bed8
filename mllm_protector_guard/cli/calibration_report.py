"""What `mllm-protector calibrate` found, for people (tables), for programs (JSON) and for `guard.json`."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mllm_protector_guard.cli.calibration_rows import Answers
from mllm_protector_guard.models.checkpoint import CalibrationRecord, DetectorConfig
from mllm_protector_guard.training.calibrate import FprBound
from mllm_protector_guard.training.calibrated_copy import calibrated, write_copy
from mllm_protector_guard.training.recalibrate import Prefer, Recalibration, detection_rates

__all__ = ["Report"]

_RATES = {"recall": "recall", "precision": "precision", "f1": "F1", "fpr": "FPR"}
_ERRORS = {"ece": "ECE", "brier": "Brier", "nll": "NLL"}


@dataclass(kw_only=True)
class Report:
    """A finished calibration.

    Attributes:
        result: Temperature and threshold.
        bound: What holds for the threshold.
        prefer: How it was chosen.
        safe: The safe answers, scored.
        labelled: The labelled answers, scored; may be none.
        threshold_before: The threshold until now.
        config: The detector's `guard.json` until now; None if it has none.
        output: Folder of the calibrated copy, once written.
        revision: Of the copy.
    """

    result: Recalibration
    bound: FprBound
    prefer: Prefer
    safe: Answers
    labelled: Answers
    threshold_before: float
    config: DetectorConfig | None
    output: Path | None = None
    revision: str | None = None

    def write_copy(self, source: Path, output: Path, *, force: bool) -> None:
        """Writes the calibrated copy of the checkpoint `source`.

        Raises:
            ConfigError: `output` may not be written.
            OSError: A file cannot be read or written.
        """
        assert self.config is not None
        config = calibrated(
            self.config, threshold=self.result.threshold, factor=self.result.factor, record=self._record()
        )
        write_copy(source, output, config, force=force)
        self.output, self.revision = output, config.revision

    def to_json(self) -> dict[str, Any]:
        """The report as values that JSON holds."""
        fit = self.result.fit
        present = None if self.config is None else self.config.temperature
        return {
            "bound": self.bound.kind,
            "max_fpr": self.bound.max_fpr,
            "confidence": self._confidence,
            "meaning": self.bound.meaning,
            "prefer": self.prefer,
            "threshold": {"before": self.threshold_before, "after": self.result.threshold},
            "temperature": {
                "before": present,
                "after": None if present is None else present * self.result.factor,
                "fitted": None if fit is None else fit.temperature,
                "fitted_in_folds": None if fit is None else [fit.lowest, fit.highest],
            },
            "safe": {
                **self.safe.counts(),
                "flagged_before": self._safe_flagged_before,
                "flagged_after": self.result.safe_flagged,
            },
            "labelled": self._labelled_to_json(),
            "output": None if self.output is None else str(self.output),
            "revision": self.revision,
        }

    def to_tables(self) -> Iterator[Table]:
        """The threshold and what it does; then the errors of the scores, if there are labelled answers."""
        yield self._settings_table()
        if self.result.fit is not None:
            yield self._reliability_table()

    def notes(self) -> Iterator[str]:
        """What a reader has to know beside the figures, a line each."""
        safe, labelled = self.safe, self.labelled
        if safe.failed or labelled.failed:
            yield (
                f"{safe.failed:,} safe answers could not be scored and count as flagged; "
                f"{labelled.failed:,} labelled ones could not and are left out"
            )
        if blank := safe.blank + labelled.blank:
            yield f"{blank:,} blank answers are left out; the guard does not judge them"
        if labelled.unlabelled:
            yield f"{labelled.unlabelled:,} labelled answers have no label and are left out"
        if len(safe.rows) > (questions := len(set(safe.questions))):
            yield (
                f"the {len(safe.rows):,} safe answers belong to {questions:,} questions, but the bound is for "
                "independent answers; give one answer a question where you can"
            )
        fit = self.result.fit
        if fit is not None and fit.reliability[0].after.nll > fit.reliability[0].before.nll:
            yield (
                "on questions that it was not fitted on, the new temperature makes the scores no more likely; "
                "give more labelled answers, or leave --labelled out to keep the present one"
            )
        if self.config is None:
            yield (
                f"pass threshold={self.result.threshold!r} to load_detector(), GuardPolicy() or --threshold"
                + ("" if fit is None else "; a detector without guard.json takes no temperature, so it was not applied")
            )

    @property
    def _confidence(self) -> float | None:
        return self.bound.confidence if self.bound.kind == "clopper-pearson" else None

    @property
    def _safe_flagged_before(self) -> int:
        return sum(score is None or score >= self.threshold_before for score in self.safe.scores)

    def _record(self) -> CalibrationRecord:
        fit = self.result.fit
        return CalibrationRecord(
            bound=self.bound.kind,
            max_fpr=self.bound.max_fpr,
            confidence=self._confidence,
            prefer=self.prefer,
            safe_rows=len(self.safe.rows),
            safe_flagged=self.result.safe_flagged,
            safe_sha256=tuple(self.safe.sha256),
            labelled_rows=len(self.labelled.rows) - self.labelled.failed,
            labelled_sha256=tuple(self.labelled.sha256),
            ece_before=None if fit is None else fit.reliability[0].before.ece,
            ece_after=None if fit is None else fit.reliability[0].after.ece,
            date=datetime.datetime.now(datetime.UTC).date(),
        )

    def _rates(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """What the detector does with the labelled answers, before and after."""
        labelled = self.labelled.labelled_scores()
        rescored = self.result.rescored(labelled.scores)
        return (
            detection_rates(labelled.scores >= self.threshold_before, labelled.harmful),
            detection_rates(rescored >= self.result.threshold, labelled.harmful),
        )

    def _labelled_to_json(self) -> dict[str, Any] | None:
        if self.result.fit is None:
            return None
        before, after = self._rates()
        return {
            **self.labelled.counts(),
            "unlabelled": self.labelled.unlabelled,
            "rates": {name: {"before": before[name], "after": after[name]} for name in _RATES},
            "reliability": [asdict(change) for change in self.result.fit.reliability],
        }

    def _settings_table(self) -> Table:
        table = Table(title="threshold and temperature", caption=f"{self.bound.kind}: {self.bound.meaning}")
        table.add_column("")
        for heading in ("before", "after"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_row("threshold", f"{self.threshold_before:.4g}", f"{self.result.threshold:.4g}")
        if self.config is not None:
            present = self.config.temperature
            table.add_row("temperature", f"{present:.4g}", f"{present * self.result.factor:.4g}")
        flagged = (self._safe_flagged_before, self.result.safe_flagged)
        rows = len(self.safe.rows)
        table.add_row(f"flagged of {rows:,} safe answers", *(f"{n:,} ({n / rows:.2%})" for n in flagged))
        if self.result.fit is not None:
            table.add_section()
            for name, heading in _RATES.items():
                shown = ("" if (rate := rates[name]) is None else f"{rate:.3f}" for rates in self._rates())
                table.add_row(f"{heading} on labelled answers", *shown)
        return table

    def _reliability_table(self) -> Table:
        assert self.result.fit is not None
        table = Table(
            title="errors of the scores as probabilities, before and after",
            caption="ECE: 15 equal bins; NLL: nats; after: with temperatures fitted on other questions (5 folds)",
        )
        table.add_column("words of the answer")
        for heading in ("rows", "harmful", *_ERRORS.values()):
            table.add_column(heading, justify="right", no_wrap=True)
        for change in self.result.fit.reliability:
            errors = (f"{getattr(change.before, name):.4f} → {getattr(change.after, name):.4f}" for name in _ERRORS)
            table.add_row(change.words, f"{change.before.rows:,}", f"{change.before.harmful:,}", *errors)
        return table
