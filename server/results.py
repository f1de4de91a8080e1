"""What a caller is told about risks, within what its key may see."""

from collections.abc import Sequence

from model.config import SafetyConfig
from model.events import Finish
from model.policy import Mode
from server.errors import HEAD_FAILED
from server.protocol.completion import Safety, TokenRisk
from server.protocol.moderation import (
    CATEGORIES,
    UNSAFE,
    InBandError,
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

    A side is flagged over its `flag` threshold, or where the policy acted on it. A side on which the head
    failed is an error. A side that is off, or a caller who may see nothing, gets no results.
    """
    nothing = InBandSide(type="moderation_results", model=model, results=[])
    if config is None or exposure == "none":
        return InBandModeration(input=nothing, output=nothing)
    first = finishes[0]
    request = _result(model, first.request_risk, config.request.flag, first.action == "refused", exposure)
    responses = [
        _result(model, one.response_risk, config.response.flag, one.action == "rolled_back", exposure)
        for one in finishes
    ]
    num_failures = sum(one.num_response_failures for one in finishes)
    return InBandModeration(
        input=nothing if modes[0] is Mode.OFF else _side(model, [request], first.num_request_failures),
        output=nothing if modes[1] is Mode.OFF else _side(model, responses, num_failures),
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


def _side(model: str, results: list[InBandResult], num_failures: int) -> InBandSide | InBandError:
    """Return the judgements of a side, or that there are none because the head failed on it."""
    if num_failures:
        message = f"the safety head failed on {num_failures} assessment(s) of this side, which count as unsafe"
        return InBandError(type="error", code=HEAD_FAILED, message=message)
    return InBandSide(type="moderation_results", model=model, results=results)


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
