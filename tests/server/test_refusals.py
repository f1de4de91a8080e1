"""The scripted model: an upper-case letter in the request or in the answer is harm."""

import openai
import pytest
from openai.types.chat import ChatCompletion

from model.testing import ScriptedLM

REFUSAL = "sorry, no. bye."
SAFE = "all is well here, friends. "
WHOLE = "nothing but good news here, as long as anyone listens."


def text_of(events):
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


@pytest.fixture(scope="module")
def turning(serve_all):
    """A server whose model turns harmful after some safe words."""
    return serve_all(SAFE + "NOW SOME HARM FOLLOWS")


def test_a_malicious_request_is_refused_in_refusal_and_content(polite):
    completion = polite.chat("HARM")
    choice = completion.choices[0]
    assert choice.finish_reason == "content_filter"
    assert (choice.message.content, choice.message.refusal) == (REFUSAL, REFUSAL)
    assert choice.safety["action"] == "refused"
    ChatCompletion.model_validate(completion.model_dump())


def test_the_bare_shape_keeps_a_refusal_out_of_content(serve):
    server = serve(refusal_in_content=False)
    message = server.post(messages=[{"role": "user", "content": "HARM"}]).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": None, "refusal": REFUSAL}


def test_a_rollback_keeps_what_was_released_and_never_shows_the_harm(turning):
    choice = turning.chat("hello").choices[0]
    assert choice.finish_reason == "content_filter"
    assert choice.message.content == f"{SAFE}\n\n{REFUSAL}"
    assert choice.message.refusal == REFUSAL
    assert choice.safety["action"] == "rolled_back"
    assert choice.safety["num_withdrawn_tokens"] == 3
    assert choice.safety["response_risk"] > 0.9


def test_a_rollback_in_the_bare_shape_has_the_released_text_alone_as_content(serve):
    server = serve(SAFE + "NOW SOME HARM", refusal_in_content=False)
    message = server.chat("hello").choices[0].message
    assert (message.content, message.refusal) == (SAFE, REFUSAL)


def test_usage_does_not_count_withdrawn_tokens(turning):
    assert turning.chat("hello").usage.completion_tokens == len(SAFE) + len(REFUSAL)


def test_a_streamed_rollback_says_the_same_as_a_whole_one(turning):
    events = turning.stream()
    assert text_of(events) == f"{SAFE}\n\n{REFUSAL}"
    finish = events[-1]["choices"][0]
    assert finish["finish_reason"] == "content_filter"
    assert finish["delta"] == {"refusal": REFUSAL}
    assert finish["safety"]["action"] == "rolled_back"


def test_a_streamed_refusal_is_content_as_it_comes_and_whole_in_the_last_chunk(polite):
    events = polite.stream(messages=[{"role": "user", "content": "HARM"}])
    assert text_of(events) == REFUSAL
    assert sum("content" in event["choices"][0]["delta"] for event in events) > 1
    assert [e["choices"][0]["delta"].get("refusal") for e in events] == [None] * (len(events) - 1) + [REFUSAL]


def test_a_stream_in_the_bare_shape_has_the_refusal_in_the_last_chunk_only(serve):
    server = serve(SAFE + "NOW SOME HARM", refusal_in_content=False)
    events = server.stream()
    assert text_of(events) == SAFE
    assert events[-1]["choices"][0]["delta"] == {"refusal": REFUSAL}


def test_content_is_never_an_empty_string_in_any_chunk(turning):
    for event in turning.stream(logprobs=True):
        assert event["choices"][0]["delta"].get("content") != ""


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_withdrawn_tokens_are_never_sent(turning, stream):
    if stream:
        found = [c["logprobs"] for e in turning.stream(logprobs=True) for c in e["choices"] if c["logprobs"]]
    else:
        found = [turning.post(logprobs=True).json()["choices"][0]["logprobs"]]
    content = "".join(token["token"] for one in found for token in one["content"] or [])
    refusal = "".join(token["token"] for one in found for token in one["refusal"] or [])
    assert (content, refusal) == (SAFE, REFUSAL)


@pytest.mark.parametrize("prefill", ["Sure, HERE IS HOW", "sure, here is how ABC"])
def test_harm_in_a_prefilled_answer_releases_none_of_the_models_text(turning, prefill):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": prefill}]
    response = turning.post(messages=turns, continue_final_message=True, add_generation_prompt=False)
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == REFUSAL
    assert choice["finish_reason"] == "content_filter"


def test_score_mode_reports_and_changes_nothing(serve):
    server = serve(SAFE + "NOW SOME HARM", input_mode="score", output_mode="score")
    choice = server.chat("HELLO").choices[0]
    assert choice.message.content == SAFE + "NOW SOME HARM"
    assert choice.finish_reason == "stop"
    assert choice.safety["request_risk"] > 0.9
    assert choice.safety["response_risk"] > 0.9


class ForkingLM(ScriptedLM):
    """Draws with its first token whether it stays harmless (`WHOLE`) or turns harmful."""

    def forward(self, token_ids, cache, **kwargs):
        said = self._split([*cache, *token_ids])[1]
        self._script = SAFE + "NOW SOME HARM" if said.startswith(SAFE[0]) else WHOLE
        output = super().forward(token_ids, cache, **kwargs)
        if not said:
            output.logits[self.tokenizer.encode(SAFE)[0]] = output.logits.max()
        return output


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("seed", "harmful"), [(4, 0), (0, 1)])  # which choice turns harmful depends on the seed
def test_one_choice_of_several_that_is_rolled_back_does_not_touch_the_others(serve, seed, harmful, stream):
    server = serve(lm=lambda: ForkingLM(WHOLE))
    if stream:
        events = [choice for event in server.stream(n=2, seed=seed) for choice in event["choices"]]
        of_choice = [[event for event in events if event["index"] == index] for index in (0, 1)]
        choices = [
            {**events[-1], "text": "".join(event["delta"].get("content") or "" for event in events)}
            for events in of_choice
        ]
    else:
        choices = server.post(n=2, seed=seed).json()["choices"]
        choices = [{**choice, "text": choice["message"]["content"]} for choice in choices]
    turned, other = choices[harmful], choices[1 - harmful]
    assert (turned["text"], turned["finish_reason"]) == (f"{SAFE}\n\n{REFUSAL}", "content_filter")
    assert (other["text"], other["finish_reason"]) == (WHOLE, "stop")
    assert [choice["safety"]["action"] for choice in (turned, other)] == ["rolled_back", "none"]
    assert [choice["safety"]["num_withdrawn_tokens"] for choice in (turned, other)] == [3, 0]


def test_a_refusal_is_an_error_only_where_the_client_parses_the_answer(polite):
    completions = polite.client().chat.completions
    harm = {"model": "tiny", "messages": [{"role": "user", "content": "HARM"}]}
    assert [chunk.choices[0].finish_reason for chunk in completions.create(stream=True, **harm)][-1] == "content_filter"
    with completions.stream(**harm) as stream:
        assert "refusal.done" in [event.type for event in stream]
        with pytest.raises(openai.ContentFilterFinishReasonError) as raised:
            stream.get_final_completion()
    assert raised.value.completion.choices[0].message.refusal == REFUSAL
    with pytest.raises(openai.ContentFilterFinishReasonError):
        completions.parse(**harm)
