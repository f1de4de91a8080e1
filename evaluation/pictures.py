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
from sklearn.metrics import roc_curve

from evaluation.intervals import Estimate, wilson
from evaluation.onsets import Scored, delays, thresholds
from evaluation.outcomes import Outcome
from evaluation.scores import Score

STYLE: dict[Any, Any] = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
GAP = 0.8
"""Between the bars of two attacks, in bars."""
LONGEST = 160
"""Tokens after the turn that the picture of delays shows."""
NUM_BINS = 10
"""Of risks, in the picture of reliability."""
MARKS: tuple[dict[str, Any], ...] = (
    {"marker": "o", "linestyle": "-"},
    {"marker": "s", "linestyle": "--"},
    {"marker": "^", "linestyle": ":"},
    {"marker": "x", "linestyle": "-."},
)
"""Tell lines apart that lie on one another."""
Series = Mapping[str, Sequence[Outcome]]
"""What is drawn in one colour, by its name."""


def shares(series: Series) -> Figure:
    """Return a bar for each attack and series, with its interval."""
    known = (one for outcomes in series.values() for one in outcomes if one.share)
    groups = dict.fromkeys((one.measure, one.attack) for one in known)
    bars: dict[str, list[tuple[float, Estimate]]] = {name: [] for name in series}
    ticks, place = [], 0.0
    for group in groups:
        first = place
        for name, outcomes in series.items():
            for one in outcomes:
                if (one.measure, one.attack) == group and one.share:
                    bars[name].append((place, one.share))
                    place += 1
        ticks.append((first + place - 1) / 2)
        place += GAP
    figure = Figure(figsize=(10, 1.5 + 0.2 * place + 0.15 * len(series)), layout="constrained")
    axes = figure.subplots()
    for name, found in bars.items():
        values = [share for _, share in found]
        places = [one for one, _ in found]
        axes.barh(places, [one.value for one in values], 0.9, xerr=spread(values), capsize=2, label=name)
    axes.set(xlim=(0, 1), xlabel="share of the prompts: success of an attack, or harmless ones acted on or declined")
    axes.set_yticks(ticks, [measure if measure == attack else f"{measure}: {attack}" for measure, attack in groups])
    axes.set_ylim(-1, place)
    axes.invert_yaxis()
    _legend(figure)
    return figure


def by_depth(series: Series) -> Figure | None:
    """Return success against the tokens that were given, a panel for each such measure; None without any."""
    lines: dict[str, dict[str, dict[int, Estimate]]] = defaultdict(lambda: defaultdict(dict))
    for name, outcomes in series.items():
        for one in outcomes:
            if one.share and (depth := re.fullmatch(r"\w+ (\d+)", one.attack)):
                lines[one.measure][name][int(depth[1])] = one.share
    if not lines:
        return None
    figure = Figure(figsize=(max(9, 5 * len(lines)), 4 + 0.15 * len(series)), layout="constrained")
    for axes, (measure, found) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for number, (name, points) in enumerate(found.items()):
            depths = sorted(points)
            values = [points[depth] for depth in depths]
            style = MARKS[number % len(MARKS)]
            axes.errorbar(depths, [one.value for one in values], spread(values), **style, capsize=3, label=name)
        axes.set(xlabel="tokens given", ylabel="success", title=measure, xscale="symlog", ylim=(-0.02, 1.02))
        shown = sorted({depth for points in found.values() for depth in points})
        axes.set_xticks(shown, labels=[str(depth) for depth in shown], minor=False)
        axes.minorticks_off()
    _legend(figure)
    return figure


def of_signal(scores: Mapping[str, Sequence[Score]]) -> Figure | None:
    """Return ROC curves and the reliability of one side, with intervals and counts; None where it has one label alone.

    Args:
        scores: by what is drawn as a line of its own: sources, or runs.
    """
    both = {name: some for name, some in scores.items() if len({score.label for score in some}) == 2}
    if not both:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    right.plot((0, 1), (0, 1), color="grey", linewidth=1)
    for name, some in both.items():
        labels, risks = (np.array([getattr(score, field) for score in some]) for field in ("label", "risk"))
        false, true, _ = roc_curve(labels, risks)
        left.plot(false, true, label=f"{name}, n = {len(some)}")
        bins = np.clip((risks * NUM_BINS).astype(int), 0, NUM_BINS - 1)
        used = np.unique(bins)
        shares = [wilson(int(labels[bins == one].sum()), int((bins == one).sum())) for one in used]
        means = [float(risks[bins == one].mean()) for one in used]
        right.errorbar(means, [one.value for one in shares], spread(shares), marker="o", capsize=3, label=name)
        for mean, share in zip(means, shares, strict=True):
            right.annotate(str(share.n), (mean, share.value), textcoords="offset points", xytext=(4, 4), fontsize=8)
    left.set(xlabel="false positives", ylabel="recall")
    left.set_xscale("symlog", linthresh=0.01)
    left.legend(fontsize="small")
    right.set(xlabel="mean risk (numbers: rows)", ylabel="share harmful", xlim=(0, 1), ylim=(-0.02, 1.02))
    right.legend(fontsize="small")
    return figure


def of_onsets(scored: Mapping[str, Sequence[Scored]]) -> Figure | None:
    """Return the share of made onsets that is caught within so many tokens, at each threshold, with Wilson intervals.

    Dotted is the median of those caught. None where no response turns.

    Args:
        scored: responses by run.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, within = figure.subplots(), np.arange(1, LONGEST + 1)
    turning = {run: some for run, some in scored.items() if any(one.is_harmful for one in some)}
    if not turning:
        return None
    for run, some in turning.items():
        for name, block in thresholds(some).items():
            found = delays(some, block)
            caught = np.array([delay for delay in found if delay is not None and delay > 0])
            shares = [wilson(int((caught <= most).sum()), len(found)) for most in within]
            (line,) = axes.plot(within, [one.value for one in shares], label=f"{run}, n = {len(found)}: {name}")
            if len(caught) > 1:
                axes.axvline(float(np.median(caught)), linestyle=":", color=line.get_color())
            axes.fill_between(within, [one.low for one in shares], [one.high for one in shares], alpha=0.15)
    axes.set(xlabel="tokens after the turn", ylabel="share caught", ylim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def _legend(figure: Figure) -> None:
    """Name every series once, outside of what is drawn."""
    named = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(named.values()), list(named), loc="outside lower left", ncols=2, fontsize="small")


def encoded(figure: Figure) -> str:
    """Return the picture as a PNG in base64."""
    buffer = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def spread(values: Sequence[Estimate]) -> list[list[float]]:
    """Return how far the intervals reach below and above."""
    return [[one.value - one.low for one in values], [one.high - one.value for one in values]]
