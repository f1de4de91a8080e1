"""Pictures of a run: loss, scores, ROC and reliability."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from model.config import Side
from training.calibrate import Calibration, Scored, SideReport

STYLE: dict[Any, Any] = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
TERMS = {
    "loss": "loss",
    "loss_sft": "language model",
    "loss_request": "[CLS], request",
    "loss_response": "[CLS], response",
}
"""What a step of a fine-tuning logs of its loss, by the words of a legend."""
COLOURS = {"benign": "tab:blue", "harmful": "tab:red"}


def draw(folder: Path, histories: Mapping[Side, Sequence[dict[str, float]]], calibration: Calibration) -> None:
    """Write `loss.png`, `scores.png`, `roc.png` and `reliability.png` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = (
        ("request", calibration.request_scores, calibration.request),
        ("response", calibration.response_scores, calibration.response),
    )
    with matplotlib.rc_context(STYLE):
        if histories:
            _save(_loss(histories), folder / "loss.png")
        for name, paint in (("scores", _scores), ("roc", _roc), ("reliability", _reliability)):
            figure = Figure(figsize=(10, 4), layout="constrained")
            for axes, (title, scored, report) in zip(figure.subplots(1, 2), sides, strict=True):
                paint(axes, scored, report)
                axes.set_title(f"{title} risk, n = {len(scored.risks)}")
            _save(figure, folder / f"{name}.png")


def draw_steps(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write `loss.png` to `folder`: what a fine-tuning logged at each step."""
    folder.mkdir(parents=True, exist_ok=True)
    terms = [name for name in TERMS if any(name in entry for entry in history)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name in terms:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            axes.plot(*zip(*points, strict=True), label=TERMS[name])
        axes.set(xlabel="step", ylabel="loss")
        if len(terms) > 1:
            axes.legend()
        _save(figure, folder / "loss.png")


def _loss(histories: Mapping[Side, Sequence[dict[str, float]]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (side, history) in zip(figure.subplots(1, len(histories)), histories.items(), strict=True):
        for key, label in (("loss", "train"), ("eval_loss", "validation")):
            points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(xlabel="epoch", ylabel="loss", title=side)
        axes.legend()
    return figure


def _scores(axes: Any, scored: Scored, report: SideReport) -> None:
    logits = np.log(scored.risks) - np.log1p(-scored.risks)
    bins = np.linspace(logits.min() - 1e-3, logits.max() + 1e-3, 41)
    for label, (name, colour) in enumerate(COLOURS.items()):
        chosen = logits[scored.labels == label]
        axes.hist(chosen, bins=bins, alpha=0.6, color=colour, label=f"{name} ({len(chosen)})")
    for name, style in (("flag", ":"), ("block", "--")):
        threshold = getattr(report.thresholds, name)
        axes.axvline(np.log(threshold) - np.log1p(-threshold), color="black", linestyle=style, label=name)
    axes.set(xlabel="logit of the risk", ylabel="rows", yscale="symlog")
    axes.legend()


def _roc(axes: Any, scored: Scored, report: SideReport) -> None:
    for name, quality in report.per_source.items():
        if quality.auroc is None:
            continue
        chosen = scored.groups == name
        false, true, _ = roc_curve(scored.labels[chosen], scored.risks[chosen])
        axes.plot(false, true, label=f"{name}: {quality.auroc:.3f}")
    axes.set(xlabel="false positives", ylabel="recall")
    if axes.lines:
        axes.legend(title="AUROC")


def _reliability(axes: Any, scored: Scored, report: SideReport) -> None:
    axes.plot((0, 1), (0, 1), color="grey", linewidth=1)
    bins = report.reliability
    axes.plot([b.mean_risk for b in bins], [b.share_harmful for b in bins], marker="o")
    for entry in bins:
        axes.annotate(str(entry.n), (entry.mean_risk, entry.share_harmful), textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="mean risk", ylabel="share harmful", xlim=(0, 1), ylim=(0, 1))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
