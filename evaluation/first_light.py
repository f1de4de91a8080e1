"""Twenty requests of our own writing through the `openai` client: what comes back?

    python -m evaluation.first_light --server http://127.0.0.1:8000 --out runs/first_light.md

Each request is sent plain, streamed, and opened with a prefilled assistant message, at the server's
default policy and with the input side set to `score`, which leaves detection to the response side.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from openai import OpenAI, OpenAIError

from evaluation.client import add_arguments, connect
from evaluation.intervals import wilson

SUITE = Path(__file__).parent / "texts" / "first_light.yaml"
POLICIES: dict[str, dict[str, Any]] = {
    "default": {},
    "input score": {"moderation": {"model": "omni-moderation-latest", "policy": {"input": {"mode": "score"}}}},
}
WAYS = ("plain", "streamed", "prefilled")
MAX_TOKENS = 64


class Case(NamedTuple):
    """One request of the suite, sent in one way under one policy."""

    kind: str
    number: int
    policy: str
    way: str


@dataclass(frozen=True)
class Outcome:
    """What came back for one request."""

    finish_reason: str
    safety: dict[str, Any]
    text: str
    refusal: str | None

    @property
    def is_acted_on(self) -> bool:
        """Whether the policy refused the request or rolled the response back."""
        return self.finish_reason == "content_filter"


def send(client: OpenAI, model: str, item: dict[str, str], way: str, extra: dict[str, Any]) -> Outcome:
    """Send one request in one way and return what came back."""
    messages: list[Any] = [{"role": "user", "content": item["request"]}]
    extra = dict(extra)
    if way == "prefilled":
        messages.append({"role": "assistant", "content": item["opening"]})
        extra |= {"continue_final_message": True, "add_generation_prompt": False}
    create = client.chat.completions.create
    if way != "streamed":
        choice = create(model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS, extra_body=extra).choices[
            0
        ]
        safety = getattr(choice, "safety", {})
        return Outcome(choice.finish_reason, safety, choice.message.content or "", choice.message.refusal)
    text, refusal, reason = "", None, ""
    safety = {}
    for chunk in create(
        model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS, stream=True, extra_body=extra
    ):
        for part in chunk.choices:
            text += part.delta.content or ""
            refusal = part.delta.refusal or refusal
            if part.finish_reason:
                reason, safety = part.finish_reason, getattr(part, "safety", {})
    return Outcome(reason, safety, text, refusal)


def collect(client: OpenAI, model: str, suite: Mapping[str, Sequence[dict[str, str]]]) -> dict[Case, Outcome]:
    """Send every request of the suite in every way under every policy and return what came back."""
    return {
        Case(kind, number, policy, way): send(client, model, item, way, extra)
        for kind, items in suite.items()
        for number, item in enumerate(items, start=1)
        for policy, extra in POLICIES.items()
        for way in WAYS
    }


def report(outcomes: Mapping[Case, Outcome]) -> str:
    """Return how often the policy acted, and every outcome, as Markdown tables."""
    counts = ["| requests | policy | way | n | refused or rolled back |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for case, got in outcomes.items():
        groups[case.kind, case.policy, case.way].append(got.is_acted_on)
    for group, acted in groups.items():
        share = wilson(sum(acted), len(acted))
        counts.append(f"| {' | '.join(group)} | {share.n} | {sum(acted)} [{share.low:.0%}, {share.high:.0%}] |")
    rows = [
        "| request | policy | way | finish reason | action | request risk | response risk | withdrawn | released |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(case, got) for case, got in outcomes.items()),
    ]
    return "\n".join([*counts, "", *rows, ""])


def _row(case: Case, got: Outcome) -> str:
    """Return one outcome; a released continuation of a malicious request is given by its length only."""
    released = got.text.removesuffix(got.refusal or "").strip()
    shown = f"{len(released)} characters" if released else "nothing"
    if case.kind == "benign" and released:
        shown = released[:60].replace("\n", " ").replace("|", "/") + "…"
    risks = f"{_risk(got.safety['request_risk'])} | {_risk(got.safety['response_risk'])}"
    return (
        f"| {case.kind} {case.number} | {case.policy} | {case.way} | {got.finish_reason} | {got.safety['action']} "
        f"| {risks} | {got.safety['num_withdrawn_tokens']} | {shown} |"
    )


def _risk(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Send twenty requests of our own to a running server.")
    add_arguments(parser, key="that may loosen")
    parser.add_argument("--out", type=Path, help="write the report here as well")
    args = parser.parse_args(argv)
    try:
        suite = yaml.safe_load(SUITE.read_text(encoding="utf-8"))
        text = report(collect(*connect(args.server, args.api_key), suite))
    except (OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.first_light: {error}\n")
        return 1
    sys.stdout.write(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
