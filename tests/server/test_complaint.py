"""No wrong value is answered in words of pydantic; the words themselves stand in test_wrong_input.py."""

import re

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from server.complaint import shortened
from server.errors import as_api_error
from server.protocol.chat import ChatMessage, ChatRequest
from server.protocol.moderation import ModerationRequest
from server.protocol.safety import ScoreRequest

USER = {"role": "user", "content": "hello"}
WRONG = [True, -7, 1.5, float("nan"), "x", "", [], {}, None, ["x"], [[]], [None], {"x": None}, 10**30, "\u00e9" * 300]
OF_PYDANTIC = re.compile(r"valid |validation|dictionary|instance|tuple|attribute|\b(True|False|None|nan)\b|Input|parse")


def bodies(model):
    """Return bodies of a request, each with one wrong value somewhere."""
    base = {"input": "x"} if model is ModerationRequest else {"model": "tiny", "messages": [USER]}
    yield from ({**base, field: value} for field in model.model_fields for value in WRONG)
    yield from ({**base, "input": [value, "x"]} for value in WRONG)
    yield from ({**base, "messages": [{**USER, field: value}]} for field in ChatMessage.model_fields for value in WRONG)
    yield from ({**base, "messages": [{**USER, "content": [value]}]} for value in WRONG)
    yield from ({**base, "messages": [{**USER, "content": [{"type": value, "text": "x"}]}]} for value in WRONG)
    yield from ({**base, "moderation": {"model": "tiny", "policy": {"input": value}}} for value in WRONG)
    yield from ({**base, "moderation": {"model": "tiny", "policy": {"input": {"mode": value}}}} for value in WRONG)
    yield from ({**base, field: {"5": value}} for field in ("logit_bias", "metadata") for value in WRONG)
    yield from WRONG


@pytest.mark.parametrize("model", [ChatRequest, ModerationRequest, ScoreRequest])
def test_every_wrong_value_is_answered_in_plain_words_that_begin_with_its_field(model):
    messages = set()
    for body in bodies(model):
        try:
            model.model_validate(body, from_attributes=True)  # as FastAPI does
        except ValidationError as error:
            found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            answer = as_api_error(RequestValidationError(found))
            assert answer.status == 400
            assert str(answer).startswith(answer.param or "the body must be a JSON object")
            assert not OF_PYDANTIC.search(str(answer)), str(answer)
            messages.add(str(answer))
    assert len(messages) > 20


def test_what_is_repeated_of_a_value_is_cut():
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 60 + "..."
