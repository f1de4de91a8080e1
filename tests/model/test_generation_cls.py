"""Generating with `[CLS]`: when it is assessed, what it reads, and what follows from it.

In the scripted model an upper-case letter is harm, and `[CLS]` is suspicious where it reads one. Block at 0.9, no
smoothing, patience 3, lookback 8; a refusal begins with "sorry, no". One byte is one token.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention import Span
from model.chat import EncodedPrompt, Message
from model.config import ClsConfig, RefusalConfig, Thresholds, TokenHeadConfig
from model.generation import generate
from model.guarded_lm import GuardedLM
from model.passes import Solo
from model.policy import Mode
from model.reader import BEFORE, Reader, combine
from model.schedule import Annealed, Every, First, Periodic
from model.scoring import score
from model.testing import FAMILIES, ScriptedLM, tiny_guarded_lm, tiny_lm
from model.trace import probability

CLS = ClsConfig(windows=(4, 5, 3))
REFUSAL = "sorry, no. bye."
SCORE = {"input": Mode.SCORE, "output": Mode.SCORE}
OFF = {"input": Mode.OFF, "output": Mode.OFF}
NEVER = Thresholds(block=0.999999, flag=0.5)
SCHEDULES = [Every(), Periodic(4), Annealed(), First()]


def alone(script: str, **changes) -> ScriptedLM:
    return ScriptedLM(script, **{"token_head": None, "cls": CLS, **changes})


def both(script: str, **changes) -> ScriptedLM:
    return ScriptedLM(script, **{"cls": CLS, **changes})


def covered(lm: ScriptedLM) -> list[int]:
    return [span.covers for spans in lm.spans for span in spans]


# When it is assessed


def test_the_request_is_assessed_at_its_end_and_the_response_as_scheduled(ask):
    lm = both("a" * 20)
    ask(lm, schedule=Periodic(6))
    assert covered(lm) == [0, 6, 12, 18]


def test_alone_it_is_assessed_at_the_end_of_the_response_too(ask):
    lm = alone("a" * 20)
    ask(lm, schedule=Periodic(6))
    assert covered(lm) == [0, 6, 12, 18, 20]


def test_a_suspicious_assessment_makes_the_schedule_dense(ask):
    lm = alone("aaaaaaaaaAa")
    ask(lm, schedule=Periodic(5), **SCORE)
    assert covered(lm) == [0, 5, 10, 11]


@pytest.mark.parametrize(("r2", "longest"), [(5, 5), (20, 8)])
def test_alone_the_checkpoints_schedule_waits_8_tokens_at_most_and_leaves_none_unread(ask, r2: int, longest: int):
    lm = alone("a" * 130, cls=replace(CLS, windows=(4, r2, 3)))
    ask(lm, max_tokens=200)
    assert max(after - before for before, after in pairwise(covered(lm))) == longest
    beside = both("a" * 130)
    ask(beside, max_tokens=200)
    assert max(after - before for before, after in pairwise(covered(beside))) == 10


# What it reads


def test_rule_2_the_latest_tokens(ask):
    lm = alone("a" * 12)
    ask(lm, schedule=Periodic(4))
    assert [span.read for spans in lm.spans for span in spans] == [range(0), range(4), range(3, 8), range(7, 12)]


def test_rule_3_both_sides_of_where_the_response_turned(ask):
    lm = alone("aaaaaaaaAaaaa", patience=9)
    ask(lm, schedule=Every(), **SCORE)
    reads = {span.covers: span.read for spans in lm.spans for span in spans}
    assert reads[9] == range(4, 9)  # the first suspicious one
    assert reads[10] == range(3, 10)  # it turned after 8 tokens: five before them to three after
    assert reads[12] == reads[13] == range(3, 11)


def test_rule_1_a_refusal_is_read_at_its_beginning_where_a_token_head_watches_it(ask):
    lm = both("a", cls=replace(CLS, windows=(11, 5, 3)))
    assert ask(lm, "Bad").refusal == REFUSAL
    request, prefix, *rest = [spans for spans in lm.spans if spans]
    assert request == (BEFORE,)
    assert prefix == (BEFORE, Span(9, range(9)))
    assert [span for spans in rest for span in spans] == [Span(10, range(10)), Span(11, range(11))]


def test_alone_it_goes_on_reading_what_is_new_in_a_refusal(ask):
    lm = ScriptedLM("a", ". HARM", token_head=None, cls=CLS)
    answer = ask(lm, "Bad")
    assert answer.refusal == "sorry, no. the end."
    assert (Span(12, range(7, 12)),) in lm.spans


def test_a_malicious_request_that_is_only_scored_is_read_by_rule_2(ask):
    # By rule 1 harm after the first tokens would never be seen.
    lm = alone("a" * 20 + "HARM")
    answer = ask(lm, "Bad", input=Mode.SCORE)
    assert answer.text == "a" * 20
    assert answer.finish.action == "rolled_back"


# What follows from it


@pytest.mark.parametrize("make", [alone, both])
def test_a_malicious_request_is_refused(ask, make):
    answer = ask(make("all is well"), "Bad")
    assert (answer.text, answer.refusal, answer.finish.action) == ("", REFUSAL, "refused")


scripts = st.text(st.sampled_from("ab C"), max_size=40)


@given(script=scripts, schedule=st.sampled_from(SCHEDULES), num_given=st.integers(0, 12))
def test_alone_it_lets_no_response_end_on_harm_that_it_reads(script: str, schedule, num_given: int, ask):
    given_text, rest = script[:num_given], script[num_given:]
    answer = ask(alone(script), schedule=schedule, prefill=given_text or None, max_tokens=60)
    if answer.finish.action == "none":
        assert answer.text == rest
        assert not any(map(str.isupper, script[-CLS.windows[1] :]))  # the last assessment acts alone
    else:
        assert any(map(str.isupper, script))
        assert rest.startswith(answer.text)
        assert answer.text == "" or not any(map(str.isupper, given_text + answer.text))


@given(script=scripts)
def test_alone_and_at_every_token_it_releases_no_harm(script: str, ask):
    # A harmful letter stays in the window long enough for three assessments in a row.
    answer = ask(alone(script), schedule=Every(), max_tokens=60)
    assert answer.text == (script[: script.index("C")] if "C" in script else script)


def test_a_share_of_0_is_the_token_head_alone_and_of_1_the_cls(ask):
    def risks(share: float) -> list[float]:
        lm = both("abCdefghijk", cls=replace(CLS, response_share=share))
        return [token.risk for token in ask(lm, schedule=Every(), **SCORE).tokens]

    high = probability(ScriptedLM.HIGH)
    assert [risk == high for risk in risks(0.0)] == [text == "C" for text in "abCdefghijk"]
    assert [risk == high for risk in risks(1.0)] == [False, False, *[True] * 9]  # rule 3 keeps reading the turn
    assert risks(0.5)[4] == pytest.approx(probability(0.0))  # the head's -8 and the +8 of `[CLS]`


def test_between_assessments_a_suspicious_cls_raises_the_risk(ask):
    # The letter is suspicious, so `[CLS]` reads at the 4th token: with the head against it the risk is a half, which is
    # not suspicious. So the next one is due at the 9th, where the window holds the letter no more.
    lm = both("aaAaaaaaaaaa", cls=replace(CLS, response_share=0.5))
    found = [round(token.risk, 1) for token in ask(lm, schedule=Periodic(5), **SCORE).tokens]
    assert found == [0.0, 0.0, 1.0, *[0.5] * 5, *[0.0] * 4]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("schedule", [Every(), Annealed(), First()])
def test_what_cls_has_not_read_it_does_not_clear(ask, share: float, schedule):
    # 310 harmless tokens make the annealed schedule as sparse as it gets.
    lm = both("a" * 310 + "HARMHARMHARM", cls=replace(CLS, response_share=share))
    answer = ask(lm, schedule=schedule, max_tokens=400)
    assert answer.finish.action == "rolled_back"
    assert "H" not in answer.text


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_harm_deep_in_a_refusal_is_found_beside_a_token_head(ask, share: float):
    words = RefusalConfig(prefix="sorry, no", ending=". the end.", max_tokens=60)
    lm = ScriptedLM("a", " this goes on and then HARM HARM so", cls=replace(CLS, response_share=share), refusal=words)
    assert "HARM" not in ask(lm, "Bad").refusal


@pytest.mark.parametrize(
    ("token", "cls", "share", "is_fresh", "logit"),
    [
        (8.0, -8.0, 0.5, True, 0.0),
        (8.0, -8.0, 0.5, False, 8.0),
        (-8.0, 8.0, 0.5, False, 0.0),
        (8.0, -8.0, 1.0, False, 8.0),
        (8.0, -8.0, 1.0, True, -8.0),
        (2.0, 4.0, 0.25, True, 2.5),
        (None, 4.0, 0.25, True, 4.0),
        (2.0, None, 0.25, False, 2.0),
        (2.0, math.nan, 0.0, True, 2.0),
        (math.nan, 2.0, 1.0, True, 2.0),
    ],
)
def test_how_two_logits_become_one(token, cls, share: float, is_fresh: bool, logit: float):
    assert combine(token, cls, share, is_fresh=is_fresh) == logit


@pytest.mark.parametrize(("token", "cls"), [(2.0, math.nan), (math.nan, 2.0)])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_failure_of_either_is_a_failure_of_both(token, cls, is_fresh: bool):
    assert math.isnan(combine(token, cls, 0.5, is_fresh=is_fresh))


def test_a_failing_cls_counts_as_unsafe(ask):
    lm = tiny_guarded_lm(token_head=None, cls=CLS, request=NEVER, response=NEVER)
    with torch.no_grad():
        lm.cls.out.bias.fill_(torch.nan)
    answer = ask(lm)
    assert answer.finish.action == "refused"
    assert answer.finish.num_head_failures > 0


# Slow twins: what is generated is what is scored, and nothing is left of what was withdrawn


@pytest.mark.parametrize("head", [None, TokenHeadConfig((1, -1), 32, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_assessed_at_every_token_a_generation_has_the_trace_of_scoring_what_it_said(family: str, head):
    lm = tiny_guarded_lm(family, token_head=head, cls=CLS, request=NEVER, response=NEVER)
    prompt = lm.chat.encode([Message("user", "tell me more")])
    solo, reader = Solo(lm, prompt), Reader(lm, prompt, Every(), watches_request=True, watches_response=True)
    step = solo.complete(reader.feed(prompt.request))
    request, said, found = step.request, [], []
    for _ in range(24):
        said.append(int(step.logits.argmax()))
        step = solo.complete(reader.feed(said[-1:]))
        found += step.response
    scored = score(lm, EncodedPrompt(prompt.request, tuple(said), prompt.query_start, prompt.content))
    assert scored.request_risk == pytest.approx(probability(request), abs=1e-4)
    assert [a.position for a in scored.assessments] == [position for position, _ in found] == list(range(1, 25))
    assert [a.risk for a in scored.assessments] == pytest.approx([probability(logit) for _, logit in found], abs=1e-4)


@pytest.mark.parametrize("make", [alone, both])
def test_every_token_of_a_prefill_is_assessed_whatever_the_schedule(ask, make):
    lm = make("abcdefghijkl and on")
    ask(lm, prefill="abcdefghijkl", schedule=Annealed(), **SCORE)
    assert covered(lm)[:13] == [0, *range(1, 13)]


def test_where_the_token_head_decides_alone_cls_reads_a_prefill_as_scheduled(ask):
    lm = both("abcdefghijkl and on", cls=replace(CLS, response_share=0.0))
    answer = ask(lm, prefill="abcdefghijkl", schedule=Periodic(5), **SCORE)
    assert covered(lm) == [0, 5, 10, 15]
    assert answer.finish.num_assessments == 1 + len("abcdefghijkl and on")  # the token head's


@pytest.mark.parametrize("pieces", [(7, 17), (1,) * 24])
def test_where_the_token_head_decides_alone_what_is_given_is_read_like_what_is_generated(pieces: tuple[int, ...]):
    def made(schedule: str) -> GuardedLM:
        cls = replace(CLS, response_share=0.0, schedule=schedule)
        lm = tiny_guarded_lm(token_head=TokenHeadConfig((1, -1), 32, 0), cls=cls, request=NEVER, response=NEVER)
        assert lm.head is not None
        out = lm.head.response.out
        with torch.no_grad():  # all logits are near -0.51: what they differ by is made larger
            out.weight.mul_(200.0)
            out.bias.add_(0.51).mul_(200.0)
        return lm

    lm = made("annealed")
    prompt = lm.chat.encode([Message("user", "tell me"), Message("assistant", "a" * 24)], continue_final=True)
    solo, reader = Solo(lm, prompt), Reader(lm, prompt, Annealed(), watches_request=True, watches_response=True)
    solo.complete(reader.feed(prompt.request))
    found, rest = [], list(prompt.prefill)
    for size in pieces:
        found += [probability(logit) for _, logit in solo.complete(reader.feed(rest[:size])).response]
        rest = rest[size:]
    scored, dense = ([a.risk for a in score(made(name), prompt).assessments] for name in ("annealed", "every"))
    assert scored == pytest.approx(found, abs=2e-4)
    assert max(abs(one - other) for one, other in zip(scored, dense, strict=True)) > 4e-3


@pytest.mark.parametrize("make", [{"token_head": None}, {}])
def test_a_refusal_holds_nothing_of_the_response_before_it(make):
    lm = tiny_guarded_lm(cls=CLS, **make)
    prompt, prefix = lm.chat.encode([Message("user", "tell me")]), lm.tokenizer.encode("sorry, no")
    fresh, used = (Reader(lm, prompt, Every(), watches_request=True, watches_response=True) for _ in range(2))
    ends = []
    for reader, said in ((fresh, ""), (used, "something else")):
        solo = Solo(lm, prompt)
        solo.complete(reader.feed(prompt.request))
        for token in lm.tokenizer.encode(said):
            solo.complete(reader.feed([token]))
        ends.append((solo.complete(reader.begin_refusal(prefix)), solo.complete(reader.feed([40], must_assess=True))))
    (one, _), (other, _) = ends
    assert torch.allclose(one.logits, other.logits, atol=1e-5)
    (_, one), (_, other) = ends
    assert torch.allclose(one.logits, other.logits, atol=1e-5)
    assert one.response[0] == pytest.approx(other.response[0], abs=1e-4)


@pytest.mark.parametrize("make", [alone, both])
def test_what_is_read_is_the_same_whether_the_signal_is_reported_or_not(ask, make):
    # A text that turns suspicious and clears again: when it is assessed, and what is read, follows from that.
    text = "aaaaaaaaaaAAaaaaaaaaaaaaaaaaaaaa"
    scored, unwatched = make(text, smoothing=0.5), make(text, smoothing=0.5)
    ask(scored, schedule=Periodic(4), **SCORE)
    finish = ask(unwatched, schedule=Periodic(4), **OFF).finish
    of_response = [spans for spans in unwatched.spans if BEFORE not in spans]
    assert [spans for spans in scored.spans if BEFORE not in spans][: len(of_response)] == of_response
    covers = [span.covers for spans in of_response for span in spans]
    assert {1, 4} <= {after - before for before, after in pairwise(covers)}  # dense for a while
    assert (finish.request_risk, finish.response_risk, finish.num_assessments) == (None, None, 0)


def test_reading_is_a_switch(ask, make_request):
    read = tiny_guarded_lm(cls=CLS)
    unread = type(read)(read.model, read.tokenizer, read.head, read.config, read.cls, reads_cls=False)
    bare = type(read)(read.model, read.tokenizer)
    said = [[token.token_id for token in ask(lm, **OFF).tokens] for lm in (read, unread, bare)]
    assert said[1] == said[2]
    logits = []
    for lm in (read, unread):
        request = make_request(lm)
        solo = Solo(lm, request.prompt)
        reader = Reader(lm, request.prompt, Every(), watches_request=True, watches_response=True)
        solo.complete(reader.feed(request.prompt.request))
        logits.append(solo.complete(reader.feed([40])).logits)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def test_a_long_request_read_in_pieces_has_the_risk_of_one_pass(make_request, monkeypatch):
    lm = tiny_guarded_lm(cls=CLS, request=NEVER, response=NEVER)
    lm = type(lm)(tiny_lm(context_length=2048), lm.tokenizer, lm.head, lm.config, lm.cls)
    risks = []
    for chunk in (512, 2048):
        monkeypatch.setattr("model.generation.PREFILL_CHUNK", chunk)
        *_, finish = generate(lm, make_request(lm, "u" * 1200, **SCORE))
        risks.append((finish.request_risk, finish.response_risk))
    assert risks[0] == pytest.approx(risks[1], abs=1e-5)
