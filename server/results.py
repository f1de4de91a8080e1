"""What a caller is told about risks, within what its key may see."""

from collections.abc import Sequence

from model.config import SafetyConfig
from model.events import Finish
from model.policy import Mode
from server.protocol.completion import Safety, TokenRisk
from server.protocol.moderation import (
    CATEGORIES,
    UNSAFE,
    InBandModeration,
    InBandResult,
    InBandSide,
    ModerationResult,
)
from server.settings import Exposure


def safety(finish: Finish, exposure: Exposure, trace: list[TokenRisk] | None) -> Safety:
    """Return the `safety` object of one choice; `trace` is left out where it is None."""
    is_full = exposure == "full"
    found = Safety(
        action=finish.action,
        request_risk=finish.request_risk if is_full else None,
        response_risk=finish.response_risk if is_full else None,
        num_assessments=None if exposure == "none" else finish.num_assessments,
        num_withdrawn_tokens=None if exposure == "none" else finish.num_withdrawn_tokens,
    )
    return found if trace is None else found.model_copy(update={"trace": trace})


def in_band(
    model: str,
    finishes: Sequence[Finish],
    config: SafetyConfig | None,
    modes: tuple[Mode, Mode],
    exposure: Exposure,
) -> InBandModeration:
    """Return the in-band `moderation` object: one result of the input, one of the output per choice.

    A side is flagged over its `flag` threshold, or where the policy acted on it. A side that is off, or
    a caller who may see nothing, gets no results.
    """
    inputs: list[InBandResult] = []
    outputs: list[InBandResult] = []
    if config is not None and exposure != "none":
        if modes[0] is not Mode.OFF:
            first = finishes[0]
            acted = first.action == "refused"
            inputs = [_result(model, first.request_risk, config.request.flag, acted, exposure)]
        if modes[1] is not Mode.OFF:
            outputs = [
                _result(model, one.response_risk, config.response.flag, one.action == "rolled_back", exposure)
                for one in finishes
            ]
    return InBandModeration(
        input=InBandSide(type="moderation_results", model=model, results=inputs),
        output=InBandSide(type="moderation_results", model=model, results=outputs),
    )


def moderation(risk: float, flag: float, exposure: Exposure) -> ModerationResult:
    """Return the judgement of one text with all categories; see `ModerationResult` on what 0 means."""
    flagged = risk > flag
    zeros: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    return ModerationResult(
        flagged=flagged,
        categories={**dict.fromkeys(CATEGORIES, False), UNSAFE: flagged},
        category_scores={**zeros, UNSAFE: _score(risk, flagged, exposure)},
        category_applied_input_types={name: ["text"] for name in (*CATEGORIES, UNSAFE)},
    )


def _result(model: str, risk: float | None, flag: float, acted: bool, exposure: Exposure) -> InBandResult:
    """Return one in-band result. A text without an assessment, such as an empty answer, has risk 0."""
    flagged = acted or (risk is not None and risk > flag)
    return InBandResult(
        type="moderation_result",
        model=model,
        flagged=flagged,
        categories={UNSAFE: flagged},
        category_scores={UNSAFE: _score(risk or 0.0, flagged, exposure)},
        category_applied_input_types={UNSAFE: ["text"]},
    )


def _score(risk: float, flagged: bool, exposure: Exposure) -> float:
    return risk if exposure == "full" else float(flagged)
