"""What the head reads while a model generates and scores, against one plain forward pass without a cache.

The model is a tiny real one: its states are its own, but it says what its script says. One byte is one token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.chat import EncodedPrompt, Message
from model.config import Side, TokenHeadConfig
from model.events import Finish
from model.generation import generate
from model.guarded_lm import Assessed, GuardedLM, StepOutput
from model.holdback import ResponseToken
from model.policy import Mode
from model.request import GenerationRequest
from model.sampling import GREEDY
from model.schedule import Annealed, Every, First, Periodic, Schedule
from model.scoring import score
from model.testing import tiny_guarded_lm, tiny_lm
from model.trace import probability

FAMILIES = ["llama", "mistral"]
SCHEDULES = [Every(), Periodic(7), Annealed(), First()]
TEXT = "The quick brown fox jumps over the lazy dog, and packs 12 dozen jugs of wine. " * 20
HISTORY_TOKENS = 29
"""What the template adds before the newest message of a conversation, the answer "ok" before it included."""
TAIL_TOKENS = 13
"""What the template adds after the newest message."""
REFUSAL = "sorry, no. bye."
CUT_REFUSAL = "sorry, no. the end."


class WatchedLM(GuardedLM):
    """Says `script` after the first `border` tokens, and notes what is asked of it.

    Its head reads two layers, and its weights are large enough for a token more or less in a mean to show.
    """

    def __init__(self, family: str, script: str = "", border: int = 2048) -> None:
        lm = tiny_guarded_lm(family, token_head=TokenHeadConfig((1, -1), 32, 8))
        super().__init__(tiny_lm(family, context_length=2048), lm.tokenizer, lm.head, lm.config)
        with torch.no_grad():
            for part in (self.head.request, self.head.response):
                part.out.weight.mul_(10)
        self.script = (*self.tokenizer.encode(script), self.tokenizer.eos_token_id)
        self.border = border
        self.num_states: list[int] = []
        """How many states each forward pass was asked for."""
        self.features: dict[Side, list[Tensor]] = {"request": [], "response": []}
        """What each assessment read."""

    def forward(self, token_ids: Sequence[int], cache: Any, *, states_of_last: int = 0, spans: Any = ()) -> StepOutput:
        output = super().forward(token_ids, cache, states_of_last=states_of_last, spans=spans)
        self.num_states.append(states_of_last)
        logits = torch.full((self.vocab_size,), -50.0)
        logits[self.script[max(0, cache.get_seq_length() - self.border)]] = 50.0
        return replace(output, logits=logits)

    def assess(self, side: Side, features: Tensor) -> Assessed:
        self.features[side].append(features)
        return super().assess(side, features)

    def risks(self, side: Side) -> list[float]:
        """Return the risk of every position that was assessed."""
        with torch.inference_mode():
            return [probability(logit) for logit in self.head.of(side)(torch.cat(self.features[side])).tolist()]


def conversation(lm: GuardedLM, num_history: int, num_query: int, prefill: str | None = None) -> EncodedPrompt:
    """Return two turns of the user and, if there is one, a prefill; `prompt.query_start` is known beforehand."""
    messages = [Message("user", TEXT[:num_history]), Message("assistant", "ok"), Message("user", TEXT[-num_query:])]
    if prefill is not None:
        messages.append(Message("assistant", prefill))
    prompt = lm.chat.encode(messages, continue_final=prefill is not None)
    assert prompt.query_start == num_history + HISTORY_TOKENS
    assert len(prompt.request) == prompt.query_start + num_query + TAIL_TOKENS
    return prompt


def plain_features(lm: GuardedLM, ids: Sequence[int], begin: int) -> Tensor:
    """Return what the head should read at each token of the passage `ids[begin:]`: each mean is taken anew."""
    with torch.inference_mode():
        hidden = lm.model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True).hidden_states
    states = torch.cat([hidden[1][0], hidden[-1][0]], dim=-1)[begin:]
    return torch.stack([torch.cat([states[i], states[: i + 1].mean(dim=0)]) for i in range(len(states))])


def plain_risks(lm: GuardedLM, side: Side, ids: Sequence[int], begin: int) -> list[float]:
    with torch.inference_mode():
        return [probability(logit) for logit in lm.head.of(side)(plain_features(lm, ids, begin)).tolist()]


def run(
    lm: GuardedLM, prompt: EncodedPrompt, schedule: Schedule | None = None, **changes: Any
) -> tuple[Finish, list[ResponseToken]]:
    """Generate greedily, both sides scoring unless told otherwise; return the end and all tokens that left."""
    fields = {"max_tokens": 100, "sampling": GREEDY, "input": Mode.SCORE, "output": Mode.SCORE, **changes}
    *releases, finish = generate(lm, GenerationRequest(prompt, **fields), schedule)
    return finish, [token for release in releases for token in release.tokens]


# The request

LENGTHS = [
    (20, 1200),  # the query begins in the first of three pieces of 512 tokens
    (600, 600),  # in the second
    (1100, 60),  # in the last
    (483, 600),  # with the first token of a piece
    (482, 600),  # with the last token of a piece
    (484, 600),  # with the second token of a piece
    (20, 1024 - 49 - 13),  # the request ends with a piece
    (1024 - 29, 30),  # the query is the last piece
    (20, 30),  # one piece
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_history", "num_query"), LENGTHS)
def test_a_request_in_pieces_has_the_risk_of_one_plain_pass(family: str, num_history: int, num_query: int):
    lm = WatchedLM(family)
    prompt = conversation(lm, num_history, num_query)
    expected = plain_risks(lm, "request", prompt.request, prompt.query_start)[-1]
    finish, _ = run(lm, prompt)
    assert finish.request_risk == pytest.approx(expected, abs=1e-4)
    assert finish.num_assessments == 1
    assert score(lm, prompt).request_risk == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("num_history", "num_query"), LENGTHS)
def test_no_states_are_taken_but_those_of_the_query(num_history: int, num_query: int):
    lm = WatchedLM("llama")
    prompt = conversation(lm, num_history, num_query)
    run(lm, prompt)
    generated, lm.num_states = lm.num_states, []
    score(lm, prompt)
    pieces = [range(start, min(start + 512, len(prompt.request))) for start in range(0, len(prompt.request), 512)]
    assert generated == lm.num_states == [sum(place >= prompt.query_start for place in piece) for piece in pieces]


def test_no_states_are_taken_for_a_side_that_is_off():
    lm = WatchedLM("llama", "abc")
    prompt = conversation(lm, 20, 30)
    lm.border = len(prompt.request)
    for modes, expected in [
        ((Mode.OFF, Mode.OFF), [0, 0, 0, 0]),
        ((Mode.SCORE, Mode.OFF), [30 + TAIL_TOKENS, 0, 0, 0]),
        ((Mode.OFF, Mode.SCORE), [0, 1, 1, 1]),
    ]:
        lm.num_states = []
        run(lm, prompt, input=modes[0], output=modes[1])
        assert lm.num_states == expected


def test_what_was_said_before_the_query_is_in_the_states_but_not_in_their_mean():
    lm = WatchedLM("llama")
    prompt = conversation(lm, 300, 30)
    risks = [score(lm, replace(prompt, query_start=start)).request_risk for start in (0, prompt.query_start)]
    assert risks[0] != pytest.approx(risks[1], abs=1e-3)  # so the tests above would see a mean of another passage


# The response


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_history", "num_query"), [(20, 30), (600, 600), (20, 1024 - 49 - 13), (400, 60)])
def test_scores_are_those_of_one_plain_pass(family: str, num_history: int, num_query: int):
    lm = WatchedLM(family)
    prompt = conversation(lm, num_history, num_query, TEXT[:700])
    trace = score(lm, prompt)
    ids, border = (*prompt.request, *prompt.prefill), len(prompt.request)
    of_request = plain_risks(lm, "request", prompt.request, prompt.query_start)[-1]
    of_response = plain_risks(lm, "response", ids, border)
    assert trace.request_risk == pytest.approx(of_request, abs=1e-4)
    assert [a.position for a in trace.assessments] == list(range(1, 701))
    assert [a.risk for a in trace.assessments] == pytest.approx(of_response, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_prefill_and_what_follows_are_one_passage(family: str, schedule: Schedule):
    # The prefill of 600 tokens is read in two pieces, and assessed at every token.
    lm = WatchedLM(family, TEXT[:640])
    prompt = conversation(lm, 20, 30, TEXT[:600])
    lm.border = len(prompt.request)
    finish, tokens = run(lm, prompt, schedule)
    whole = replace(prompt, prefill=(*prompt.prefill, *(token.token_id for token in tokens)))
    assert len(whole.prefill) == 640
    found = lm.risks("response")
    trace = score(lm, whole)
    expected = plain_risks(lm, "response", (*whole.request, *whole.prefill), len(whole.request))
    assert found[:600] == pytest.approx(expected[:600], abs=1e-4)
    assert found[-1] == pytest.approx(expected[-1], abs=1e-4)
    assert [a.risk for a in trace.assessments] == pytest.approx(expected, abs=1e-4)
    assert finish.request_risk == pytest.approx(trace.request_risk, abs=1e-4)


SCRIPT = "some words that go on for a while, and a stop and more"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_prefill", [0, 5])
@pytest.mark.parametrize(
    ("changes", "num_said", "reason"),
    [
        ({}, len(SCRIPT), "stop"),
        ({"max_tokens": 40}, 40, "length"),
        ({"stop": ("stop",)}, SCRIPT.index("stop") + 4, "stop"),
    ],
)
def test_every_end_is_assessed_as_in_scoring_and_no_token_is_fed_twice(
    family: str, schedule: Schedule, num_prefill: int, changes: dict[str, Any], num_said: int, reason: str
):
    lm = WatchedLM(family, TEXT[:num_prefill] + SCRIPT)
    prompt = conversation(lm, 20, 30, TEXT[:num_prefill] or None)
    lm.border = len(prompt.request)
    finish, tokens = run(lm, prompt, schedule, **changes)
    num_passes, risk = len(lm.num_states), lm.risks("response")[-1]

    said = tuple(lm.script[num_prefill : num_prefill + num_said])
    trace = score(lm, replace(prompt, prefill=(*prompt.prefill, *said)))
    assert finish.reason == reason
    assert risk == pytest.approx(trace.assessments[-1].risk, abs=1e-4)
    assert num_passes == 1 + (num_prefill > 0) + num_said  # request, prefill, and each token once
    for token, assessment in zip(tokens, trace.assessments[num_prefill:], strict=False):
        assert token.risk is None or token.risk == pytest.approx(assessment.risk, abs=1e-4)
    if schedule == First():
        assert finish.num_assessments == 1 + num_prefill + 1
        if not num_prefill:
            assert finish.response_risk == pytest.approx(risk, abs=1e-6)


def test_a_token_without_an_assessment_is_in_the_mean_of_the_next_one():
    # The mean that is assessed at the end is that of all 54 tokens, not that of the one assessed.
    lm = WatchedLM("llama", SCRIPT)
    prompt = conversation(lm, 20, 30)
    lm.border = len(prompt.request)
    run(lm, prompt, First())
    (found,) = lm.features["response"]
    expected = plain_features(lm, (*prompt.request, *lm.script[:-1]), lm.border)
    torch.testing.assert_close(found[0], expected[-1], atol=1e-5, rtol=1e-4)
    assert (found[0, 64:] - found[0, :64]).abs().max() > 0.1


# The refusal


def guarded(side: Side) -> tuple[WatchedLM, torch.Tensor]:
    """Return a model that calls everything on one side harm, and its plain features of the refusal."""
    lm = WatchedLM("llama", REFUSAL)
    with torch.no_grad():
        lm.head.request.out.bias.fill_(50.0 if side == "request" else -50.0)
        lm.head.response.out.bias.fill_(50.0 if side == "response" else -50.0)
    prompt = conversation(lm, 20, 30)
    lm.border = len(prompt.request)
    return lm, plain_features(lm, (*prompt.request, *lm.script[:-1]), lm.border)


def test_a_refusal_is_a_passage_that_begins_with_its_prefix():
    lm, expected = guarded("request")
    finish, tokens = run(lm, conversation(lm, 20, 30), input=Mode.BLOCK, output=Mode.BLOCK)
    assert finish.action == "refused"
    assert lm.tokenizer.decode([token.token_id for token in tokens]) == REFUSAL
    found = torch.cat(lm.features["response"])
    torch.testing.assert_close(found, expected[len("sorry, no") :], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefill", [None, "sorr"])
def test_a_refusal_after_a_rollback_holds_nothing_of_what_was_withdrawn(prefill: str | None):
    # The third token raises the alarm; or the prefill does, whose four are assessed together. The refusal is harm
    # too here, so it ends after three tokens of its own. Its text is that of the answer: one pass gives both.
    lm, expected = guarded("response")
    finish, _ = run(lm, conversation(lm, 20, 30, prefill), input=Mode.BLOCK, output=Mode.BLOCK)
    assert finish.action == "rolled_back"
    answer, refusal = expected[: len(prefill or "sor")], expected[len("sorry, no") : len("sorry, no. b")]
    found = torch.cat(lm.features["response"])
    torch.testing.assert_close(found, torch.cat([answer, refusal]), atol=1e-5, rtol=1e-4)


def test_a_refusal_is_a_passage_of_its_own_where_the_output_side_is_off():
    lm, expected = guarded("request")
    run(lm, conversation(lm, 20, 30), input=Mode.BLOCK, output=Mode.OFF)
    torch.testing.assert_close(torch.cat(lm.features["response"]), expected[9:], atol=1e-5, rtol=1e-4)
