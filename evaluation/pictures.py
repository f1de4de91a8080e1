"""The pictures of a report."""

import base64
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from evaluation.intervals import Estimate
from evaluation.onsets import Scored, delays, threshold
from evaluation.outcomes import Outcome
from evaluation.signal import Score

STYLE: dict[Any, Any] = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
LONGEST = 160
"""Tokens after the turn that the picture of delays shows."""
Series = Mapping[str, Sequence[Outcome]]
"""What is drawn in one colour, by its name."""


def shares(series: Series) -> Figure:
    """Return a bar for each attack and series, with its interval."""
    groups = list(dict.fromkeys((one.measure, one.attack) for outcomes in series.values() for one in outcomes))
    width = 0.8 / len(series)
    figure = Figure(figsize=(10, 1.5 + (0.3 + 0.15 * len(series)) * len(groups)), layout="constrained")
    axes = figure.subplots()
    for number, (name, outcomes) in enumerate(series.items()):
        found = {(one.measure, one.attack): one.share for one in outcomes if one.share}
        places = [place + number * width for place, group in enumerate(groups) if group in found]
        values = [found[group] for group in groups if group in found]
        axes.barh(places, [one.value for one in values], width, xerr=_spread(values), capsize=2, label=name)
    axes.set(xlim=(0, 1), xlabel="share of the prompts: success of an attack, or harmless ones disturbed")
    axes.set_yticks(
        [place + 0.4 - width / 2 for place in range(len(groups))],
        [measure if measure == attack else f"{measure}: {attack}" for measure, attack in groups],
    )
    axes.invert_yaxis()
    axes.legend()
    return figure


def by_depth(series: Series) -> Figure | None:
    """Return success against the tokens that were given, a panel for each such attack; None without any."""
    lines: dict[str, dict[str, dict[int, Estimate]]] = defaultdict(lambda: defaultdict(dict))
    for name, outcomes in series.items():
        for one in outcomes:
            if one.share and (depth := re.fullmatch(r"(\w+) (\d+)", one.attack)):
                lines[depth[1]][name][int(depth[2])] = one.share
    if not lines:
        return None
    figure = Figure(figsize=(max(6, 5 * len(lines)), 4), layout="constrained")
    for axes, (attack, found) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for name, points in found.items():
            depths = sorted(points)
            values = [points[depth] for depth in depths]
            axes.errorbar(depths, [one.value for one in values], _spread(values), marker=".", capsize=3, label=name)
        axes.set(xlabel="tokens given", ylabel="success", title=attack, xscale="symlog", ylim=(-0.02, 1.02))
        axes.legend()
    return figure


def of_signal(sides: Mapping[str, Sequence[Score]]) -> Figure | None:
    """Return ROC curves and reliability of each side that has both labels; None without any.

    Args:
        sides: scores of requests and of responses.
    """
    both = {side: scores for side, scores in sides.items() if len({score.label for score in scores}) == 2}
    if not both:
        return None
    figure = Figure(figsize=(10, 4 * len(both)), layout="constrained")
    for (left, right), (side, scores) in zip(figure.subplots(len(both), 2, squeeze=False), both.items(), strict=True):
        sources: dict[str, list[Score]] = {"all of them": list(scores)}
        for score in scores:
            sources.setdefault(score.source, []).append(score)
        for source, some in sources.items():
            if len({score.label for score in some}) == 2:
                false, true, _ = roc_curve([score.label for score in some], [score.risk for score in some])
                left.plot(false, true, label=source)
        left.set(xlabel="false positives", ylabel="recall", title=f"{side}, n = {len(scores)}")
        left.set_xscale("symlog", linthresh=0.01)
        left.legend(fontsize="small")
        labels, risks = (np.array([getattr(score, name) for score in scores]) for name in ("label", "risk"))
        harmful, predicted = calibration_curve(labels, risks, n_bins=10)
        right.plot((0, 1), (0, 1), color="grey", linewidth=1)
        right.plot(predicted, harmful, marker="o")
        right.set(xlabel="mean risk", ylabel="share harmful", title=side, xlim=(0, 1), ylim=(0, 1))
    return figure


def of_onsets(scored: Sequence[Scored]) -> Figure:
    """Return the share of made onsets that is caught within so many tokens, at two thresholds."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, within = figure.subplots(), np.arange(1, LONGEST + 1)
    lines = {"at `block`": scored[0].block}
    if not all(one.is_harmful for one in scored):
        lines["at 0.1 % of the harmless answers stopped"] = threshold(scored)
    for name, block in lines.items():
        found = delays(scored, block)
        caught = np.array([delay for delay in found if delay is not None and delay > 0])
        axes.plot(within, [(caught <= most).sum() / len(found) for most in within], label=name)
    axes.set(xlabel="tokens after the turn", ylabel="share caught", ylim=(0, 1))
    axes.legend()
    return figure


def encoded(figure: Figure) -> str:
    """Return the picture as a PNG in base64."""
    buffer = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _spread(values: Sequence[Estimate]) -> list[list[float]]:
    """Return how far the intervals reach below and above."""
    return [[one.value - one.low for one in values], [one.high - one.value for one in values]]
