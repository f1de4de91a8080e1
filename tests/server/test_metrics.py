import time
from types import SimpleNamespace

import pytest

from model.chat import EncodedPrompt
from model.config import Thresholds
from model.events import HeadWork, Release
from model.holdback import ResponseToken
from model.request import GenerationRequest
from model.testing import tiny_guarded_lm
from server.engine.engine import EngineStats
from server.exchange import Exchange
from server.metrics import METRIC_NAMES, ChoiceMeter, Metrics


def test_every_metric_of_the_list_is_there_and_no_other(polite):
    polite.post()
    types = [line.split()[2] for line in polite.http.get("/metrics").text.splitlines() if line.startswith("# TYPE")]
    assert {name for name in types if not name.endswith("_created")} == set(METRIC_NAMES)


def test_requests_are_counted_by_route_status_and_finish_reason(serve):
    server = serve()
    server.chat("hello")
    server.chat("HARM", stream=True).close()
    server.post(temperature=9)
    server.http.get("/v1/models/a/b/c")
    server.http.get("/nothing/at/all")
    total = "ballast_requests_total"
    assert server.metric(f'{total}{{endpoint="/v1/chat/completions",finish_reason="stop",status="200"}}') == 1
    assert server.metric(f'{total}{{endpoint="/v1/chat/completions",finish_reason="",status="400"}}') == 1
    assert server.metric(f'{total}{{endpoint="/v1/models/{{model_id:path}}",finish_reason="",status="404"}}') == 1
    assert server.metric(f'{total}{{endpoint="unmatched",finish_reason="",status="404"}}') == 1


def test_tokens_assessments_and_times_are_measured(serve):
    server = serve()
    usage = server.post(n=2).json()["usage"]
    assert server.metric("ballast_prompt_tokens_total") == usage["prompt_tokens"]
    assert server.metric("ballast_completion_tokens_total") == usage["completion_tokens"] == 18
    assert server.metric("ballast_assessments_total") == 20
    assert server.metric("ballast_time_to_first_token_seconds_count") == 2
    assert server.metric("ballast_inter_token_seconds_count") > 0
    assert server.metric("ballast_safety_head_seconds_count") > 0
    assert server.metric('ballast_request_seconds_count{endpoint="/v1/chat/completions"}') == 1


class IdleEngine:
    """An engine that has done nothing."""

    def stats(self):
        return EngineStats(0, 0, HeadWork())


def test_tokens_that_leave_together_share_their_wait_evenly(monkeypatch):
    """First text after 1 s, then three tokens 0.6 s later, text without a token, and a token 0.3 s after the three."""
    metrics = Metrics(IdleEngine())
    exchange = Exchange("id", started=10.0)
    meter = ChoiceMeter(metrics, GenerationRequest(EncodedPrompt((1,)), max_tokens=9), exchange)
    releases = {11.0: ("a", 2), 11.6: ("bcd", 3), 11.7: ("e", 0), 11.8: ("", 0), 11.9: ("f", 1)}
    for now, (text, num_tokens) in releases.items():
        monkeypatch.setattr("server.metrics.time", SimpleNamespace(perf_counter=lambda now=now: now))
        meter.see(Release(text, (ResponseToken(5),) * num_tokens))
    samples = [line for line in metrics.render().decode().splitlines() if "_seconds" in line]
    found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in samples if line[0] != "#")}
    assert found["ballast_time_to_first_token_seconds_sum"] == pytest.approx(1.0)
    assert found["ballast_inter_token_seconds_count"] == 4
    assert found["ballast_inter_token_seconds_sum"] == pytest.approx(0.6 + 0.3)
    assert found['ballast_inter_token_seconds_bucket{le="0.25"}'] == 3
    assert found['ballast_inter_token_seconds_bucket{le="0.5"}'] == 4
    assert (exchange.prompt_tokens, exchange.completion_tokens) == (1, 6)


def test_the_time_to_the_first_token_includes_the_holdback(serve):
    """A lookback of 8 holds the first token until the ninth: at 10 ms each, and one for the prompt, over 90 ms."""
    server = serve("good day to you.", slow=True)
    server.post()
    assert server.metric("ballast_time_to_first_token_seconds_sum") > 0.09


def test_how_many_tokens_are_held_back_is_measured(serve):
    """Assessed at every token and never suspicious, a response holds back the lookback, 8; its end releases all."""
    server = serve("good day to you, my friend.")
    server.post()
    at_most = {bound: server.metric(f'ballast_held_tokens_bucket{{le="{bound}.0"}}') for bound in (0, 6, 8)}
    assert at_most[0] == at_most[6] == 1
    assert at_most[8] == server.metric("ballast_held_tokens_count") > 10


def test_decisions_risks_and_withdrawn_tokens_are_counted_by_side(serve):
    server = serve("all is well here, friends. NOW SOME HARM")
    usages = [server.chat("hello").usage, server.chat("HARM").usage]
    decisions = "ballast_safety_decisions_total"
    assert server.metric(f'{decisions}{{action="refused",side="input"}}') == 1
    assert server.metric(f'{decisions}{{action="none",side="input"}}') == 1
    assert server.metric(f'{decisions}{{action="rolled_back",side="output"}}') == 1
    assert server.metric("ballast_withdrawn_tokens_total") == 3
    assert server.metric("ballast_completion_tokens_total") == sum(usage.completion_tokens for usage in usages)
    assert server.metric("ballast_request_risk_count") == 2
    assert server.metric('ballast_request_risk_bucket{le="0.9"}') == 1
    assert server.metric("ballast_response_risk_count") == 2


def test_a_refusal_that_is_drawn_again_is_counted(serve, scripted):
    server = serve(lm=lambda: scripted("sorry, I must not", second_script="gladly", redraw_below=0.5))
    assert server.chat("hello").choices[0].message.content == "gladly"
    assert server.metric('ballast_safety_decisions_total{action="redrawn",side="input"}') == 1
    assert server.metric("ballast_withdrawn_tokens_total") == 6
    assert server.metric('ballast_safety_threshold{name="redraw",risk="request"}') == 0.5


def test_the_risk_of_a_request_is_counted_once_and_that_of_every_choice(serve):
    server = serve()
    server.chat("hello", n=4)
    assert server.metric("ballast_request_risk_count") == 1
    assert server.metric("ballast_response_risk_count") == 4


def test_the_thresholds_in_force_are_shown(serve, scripted):
    server = serve(lm=lambda: scripted("x", request=Thresholds(block=0.8, flag=0.25)))
    assert server.metric('ballast_safety_threshold{name="block",risk="request"}') == 0.8
    assert server.metric('ballast_safety_threshold{name="flag",risk="request"}') == 0.25
    assert server.metric('ballast_safety_threshold{name="block",risk="response"}') == 0.9
    told = server.http.get("/metrics").text
    assert 'name="redraw"' not in told
    assert "ballast_head_info{" in told


def test_a_failing_head_is_counted(serve_broken):
    server = serve_broken("response")
    assert server.chat("hello").choices[0].finish_reason == "content_filter"
    assert server.metric("ballast_head_failures_total") > 0


def test_what_the_head_does_is_counted_in_scoring_too(serve_broken):
    server = serve_broken("request")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "abc"}]
    assert server.post("/v1/safety/score", messages=turns).status_code == 500
    assert server.http.post("/v1/moderations", json={"input": ["a", "b"]}).status_code == 500
    assert server.metric("ballast_assessments_total") == 4 + 1
    assert server.metric("ballast_head_failures_total") == 1 + 1


def test_what_the_head_does_is_counted_for_a_client_that_leaves_too(serve_broken):
    server = serve_broken("response", "good day to you. " * 12, output_mode="score")
    stream = server.chat("hello", stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    aborted = 'ballast_requests_total{endpoint="/v1/chat/completions",finish_reason="aborted",status="499"}'
    end = time.monotonic() + 10
    while not server.metric(aborted) or server.engine.stats().num_running:
        assert time.monotonic() < end
        time.sleep(0.01)
    num_assessments = server.metric("ballast_assessments_total")
    assert num_assessments > 1
    assert server.metric("ballast_head_failures_total") == num_assessments - 1  # all but the request's


def test_running_sequences_are_shown(serve):
    server = serve("good day to you and to all of yours.", slow=True, max_running=1)
    stream = server.chat("hello", stream=True, n=2)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert server.metric("ballast_requests_running") == 1
    assert server.metric("ballast_requests_waiting") == 1
    stream.close()


def test_the_cache_is_in_use_while_a_request_runs(serve):
    server = serve(lm=tiny_guarded_lm, output_mode="off", input_mode="off")
    stream = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], stream=True, max_tokens=400,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    deadline = time.monotonic() + 10
    while not 0.0 < server.metric("ballast_kv_cache_usage") < 1.0:
        assert time.monotonic() < deadline
    stream.close()
    while server.metric("ballast_kv_cache_usage"):
        assert time.monotonic() < deadline
    assert server.metric("ballast_evictions_total") == 0
    assert server.metric("ballast_engine_restarts_total") == 0
