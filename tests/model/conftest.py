"""Builders for requests to the guarded model, and for what came back."""

from dataclasses import dataclass

import pytest

from model.chat import Message
from model.events import Finish, Release
from model.generation import generate
from model.guarded_lm import GuardedLM
from model.holdback import ResponseToken
from model.request import GenerationRequest
from model.sampling import GREEDY
from model.schedule import Schedule


@dataclass(frozen=True)
class Answer:
    """Everything that left during one generation."""

    releases: list[Release]
    finish: Finish

    @property
    def text(self) -> str:
        """The model's own answer, as released."""
        return "".join(release.text for release in self.releases if not release.is_refusal)

    @property
    def refusal(self) -> str:
        return "".join(release.text for release in self.releases if release.is_refusal)

    @property
    def tokens(self) -> list[ResponseToken]:
        return [token for release in self.releases if not release.is_refusal for token in release.tokens]

    @property
    def refusal_tokens(self) -> list[ResponseToken]:
        return [token for release in self.releases if release.is_refusal for token in release.tokens]


def _request(lm: GuardedLM, user: str = "hi", *, prefill: str | None = None, **changes) -> GenerationRequest:
    messages = [Message("user", user)]
    if prefill is not None:
        messages.append(Message("assistant", prefill))
    prompt = lm.chat.encode(messages, continue_final=prefill is not None)
    return GenerationRequest(prompt, **{"max_tokens": 40, "sampling": GREEDY, **changes})


def _ask(lm: GuardedLM, user: str = "hi", *, schedule: Schedule | None = None, **changes) -> Answer:
    *releases, finish = generate(lm, _request(lm, user, **changes), schedule)
    assert isinstance(finish, Finish)
    assert all(isinstance(release, Release) for release in releases)
    return Answer(releases, finish)


@pytest.fixture(scope="session")
def make_request():
    """Return the function that builds a request: one user turn, greedy, 40 tokens, unless told otherwise."""
    return _request


@pytest.fixture(scope="session")
def ask():
    """Return the function that generates the whole answer to one user turn."""
    return _ask
