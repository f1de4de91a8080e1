import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk


def contents(events):
    return [choice["delta"].get("content") for event in events for choice in event["choices"]]


def test_a_stream_is_made_of_chunks_of_the_openai_client_and_spells_the_answer(polite):
    chunks = list(polite.chat("hello", stream=True))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "good day."
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_first_chunk_has_the_role_and_no_content(polite):
    assert polite.stream()[0]["choices"][0]["delta"] == {"role": "assistant"}


def test_only_the_last_chunk_of_a_choice_has_a_finish_reason_and_the_safety_object(polite):
    choices = [event["choices"][0] for event in polite.stream()]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert ["safety" in choice for choice in choices] == [False] * (len(choices) - 1) + [True]


def test_every_choice_of_a_stream_is_complete(polite):
    texts = {index: "" for index in range(3)}
    reasons = []
    for event in polite.stream(n=3):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert texts == dict.fromkeys(range(3), "good day.")
    assert reasons == ["stop"] * 3


def test_usage_comes_last_and_is_null_before(polite):
    events = polite.stream(stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 9
    assert all("usage" not in event for event in polite.stream())


def test_the_moderation_chunk_comes_after_the_finish_and_before_the_usage(polite):
    events = polite.stream(moderation={"model": "tiny"}, stream_options={"include_usage": True})
    *_, finish, moderation, usage = events
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert moderation["choices"] == []
    assert moderation["moderation"]["output"]["results"][0]["flagged"] is False
    assert usage["usage"]["total_tokens"] > 0
    assert sum("moderation" in event for event in events) == 1


def test_the_clients_own_accumulator_keeps_moderation_and_usage(polite):
    with polite.client().chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        stream_options={"include_usage": True},
        moderation={"model": "omni-moderation-latest"},
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "good day."
    assert final.usage.completion_tokens == 9
    assert final.moderation.output.results[0].flagged is False


def test_log_probabilities_of_a_stream_are_those_of_the_whole_answer(polite):
    whole = polite.chat("hello", logprobs=True).choices[0].logprobs.content
    chunks = polite.chat("hello", logprobs=True, stream=True)
    parts = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in parts] == [token.token for token in whole]


def test_the_trace_of_a_stream_comes_with_the_finish(polite):
    *chunks, finish = polite.stream(safety={"trace": True})
    assert "".join(step["token"] for step in finish["choices"][0]["safety"]["trace"]) == "good day."
    assert all("safety" not in chunk["choices"][0] for chunk in chunks)


def test_a_request_that_cannot_be_honoured_is_a_plain_error_in_a_stream_too(polite):
    with pytest.raises(openai.BadRequestError) as raised:
        polite.chat("hello", stream=True, max_tokens=100_000)
    assert raised.value.code == "context_length_exceeded"


def test_a_fault_in_mid_stream_is_an_error_event_and_the_next_request_is_served(serve, scripted):
    server = serve(lm=lambda: scripted("good day.", fails_at=12))
    events = server.stream()
    assert events[-1]["error"]["code"] == "engine_error"
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert "".join(filter(None, contents(events[:-1]))) in "good day."
    assert server.chat("hello").choices[0].message.content == "good day."


def test_the_client_raises_on_a_fault_in_mid_stream(serve, scripted):
    server = serve(lm=lambda: scripted("good day.", fails_at=12))
    with pytest.raises(openai.APIError, match="safe to retry"):
        list(server.chat("hello", stream=True))


def test_text_arrives_while_the_rest_is_generated(serve):
    server = serve("good day to you and to all of yours.", slow=True)
    stream = server.chat("hello", stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert server.engine.stats().num_running == 1
    stream.close()


def test_the_end_of_the_drain_leaves_a_stream_the_time_for_its_last_event(serve, monkeypatch):
    """The library that writes the stream notices a stop by itself, and may do so before the engine."""
    monkeypatch.setattr("sse_starlette.sse.AppStatus.should_exit", True)
    assert "".join(filter(None, contents(serve("good day.", slow=True, drain_s=0).stream()))) == "good day."


def test_a_stream_that_does_not_end_soon_after_the_drain_is_cut_off(serve, monkeypatch):
    """As that of a client that does not read: the engine's last event cannot leave."""
    monkeypatch.setattr("sse_starlette.sse.AppStatus.should_exit", True)
    monkeypatch.setattr("server.sse.LAST_BYTES_S", 0.2)
    server = serve("good day to you. " * 12, slow=True, drain_s=0)
    with pytest.raises(httpx2.RemoteProtocolError):
        server.stream()
    assert server.metric('ballast_requests_total{endpoint="/v1/chat/completions",finish_reason="aborted",status="499"}')


def test_a_quiet_stream_is_kept_alive_with_comments(serve, monkeypatch):
    monkeypatch.setattr("server.sse.KEEP_ALIVE_S", 0.02)
    text = serve("good day.", slow=True).post(stream=True).text
    assert "\n: keep-alive\n" in text
    # On a busy machine one more comment may follow the end.
    assert [line for line in text.splitlines() if line.startswith("data: ")][-1] == "data: [DONE]"
