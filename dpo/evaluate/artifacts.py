"""The figures that Kubeflow's UI draws itself: the ROC curve and the confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class ClassificationArtifact(Protocol):
    """What this module needs of ``kfp.dsl.ClassificationMetrics``."""

    path: str

    def log_roc_curve(
        self, fpr: Sequence[float], tpr: Sequence[float], threshold: Sequence[float]
    ) -> None:
        """Show a curve in the UI."""

    def log_confusion_matrix(
        self, categories: Sequence[str], matrix: Sequence[Sequence[int]]
    ) -> None:
        """Show a matrix in the UI; rows are what is true."""


def log_classification(
    evaluation: Path, roc: ClassificationArtifact, confusion: ClassificationArtifact
) -> None:
    """Hand the curve and the matrix of an evaluation to the UI.

    They are written to the artifacts' files as well: kfp.local takes a cached step for lost when
    one of its outputs has no file.
    """
    text = (evaluation / "evaluation.json").read_text(encoding="utf-8")
    found = json.loads(text)["calibration"]
    points = found["roc"]
    # the first point has no threshold: no response is called chosen there
    highest = max((point["threshold"] for point in points if "threshold" in point), default=0.0)
    roc.log_roc_curve(
        [point["false_positive_rate"] for point in points],
        [point["true_positive_rate"] for point in points],
        [point.get("threshold", highest + 1) for point in points],
    )
    matrix = found["confusion"]
    confusion.log_confusion_matrix(matrix["categories"], matrix["matrix"])
    for artifact, values in ((roc, points), (confusion, matrix)):
        path = Path(artifact.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")
