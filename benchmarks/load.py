r"""How fast servers answer many clients over HTTP, paired in one run: tokens per second, first token, between tokens.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/load.py --clients 1 8 32 --rounds 5 \
        --server "ballast=.venv/bin/ballast-serve --port {port}" \
        --server "vllm=../vllm/bin/python -m vllm.entrypoints.openai.api_server --model MODEL --port {port}"

Every server is started here, and stands still (SIGSTOP) while another one is measured. A round sends the same
conversations to each, in an order that changes from round to round; each client asks for one answer after the other.
Answers are greedy and streamed, and have all the tokens that they are allowed, whatever the model would say. Ratios are
to the first server, round by round. The last line of the output is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from rich.progress import track

THINGS = ("river", "garden", "window", "letter", "bridge", "lantern", "engine", "island", "ladder", "rocket")
KINDS = ("old", "quiet", "copper", "winter", "silver", "broken", "velvet", "northern", "empty", "paper")
READY_S = 900.0


class Answer(NamedTuple):
    """One streamed answer."""

    first_s: float
    """Until its first text."""
    between_s: float
    """From the first text to the last, by piece: a token each, but for the last ones that were held back."""
    num_tokens: int


@dataclass
class Server:
    """A server under measurement."""

    name: str
    url: str
    process: "subprocess.Popen[bytes]"
    model: str = ""

    def stand(self, *, still: bool) -> None:
        """Stop or continue all its processes."""
        os.killpg(self.process.pid, signal.SIGSTOP if still else signal.SIGCONT)


@contextmanager
def started(text: str, folder: Path) -> Iterator[Server]:
    """Yield the server of `NAME=COMMAND`, ready."""
    name, _, command = text.partition("=")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command.replace("{port}", str(port)))
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    server = Server(name, f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + READY_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} did not start; see {folder / f'{name}.log'}")
            try:
                with httpx2.Client(timeout=5) as http:
                    server.model = http.get(f"{server.url}/v1/models").json()["data"][0]["id"]
                    body = {"model": server.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
                    if http.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200:
                        break
            except (httpx2.HTTPError, LookupError, ValueError):
                pass
            time.sleep(0.5)
        yield server
    finally:
        with suppress(ProcessLookupError):
            server.stand(still=False)
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def prompt_of(number: int, num_words: int) -> str:
    """Return a conversation of its own for every number."""
    drawn = random.Random(number)
    things = [f"{drawn.choice(KINDS)} {drawn.choice(THINGS)}" for _ in range(num_words // 2)]
    return f"Tell a story with these: {', '.join(things)}."


async def ask(http: httpx2.AsyncClient, server: Server, prompt: str, num_tokens: int) -> Answer:
    """Return how one answer was streamed."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first = last = 0.0
    num_pieces = told = 0
    async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                last = time.perf_counter()
                first = first or last
                num_pieces += 1
            if chunk.get("usage"):
                told = chunk["usage"]["completion_tokens"]
    # A server that does not count is taken to have sent a token with every piece.
    return Answer(first - start, (last - first) / max(1, num_pieces - 1), told or num_pieces)


async def measure(server: Server, num_clients: int, prompts: Sequence[str], num_tokens: int) -> dict[str, float]:
    """Return what so many clients got, each asking for the next answer when it has one."""
    left = list(reversed(prompts))
    answers: list[Answer] = []

    async def client(http: httpx2.AsyncClient) -> None:
        while left:
            answers.append(await ask(http, server, left.pop(), num_tokens))

    limits = httpx2.Limits(max_connections=num_clients)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(num_clients)))
        taken = time.perf_counter() - start
    spoken = [answer for answer in answers if answer.between_s > 0]
    return {
        "tokens_per_s": sum(answer.num_tokens for answer in answers) / taken,
        "first_token_ms": statistics.median(answer.first_s for answer in spoken) * 1e3,
        "between_tokens_ms": statistics.median(answer.between_s for answer in spoken) * 1e3,
        "tokens_per_answer": statistics.mean(answer.num_tokens for answer in answers),
        "without_text": len(answers) - len(spoken),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--server", action="append", required=True, help="NAME=COMMAND with {port} in it")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=2, help="of each client in a round (%(default)s)")
    parser.add_argument("--words", type=int, default=30, help="of each prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (%(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder of the servers' logs (%(default)s)")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, list[dict[str, float]]]] = {}
    with ExitStack() as stack:
        servers = []
        for text in args.server:
            servers.append(stack.enter_context(started(text, args.logs)))
            servers[-1].stand(still=True)
        number = 0
        for num_clients in args.clients:
            found[num_clients] = {server.name: [] for server in servers}
            for turn in track(range(args.rounds + 1), f"{num_clients} clients"):
                prompts = [prompt_of(number + n, args.words) for n in range(num_clients * args.answers)]
                number += len(prompts)
                for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
                    server.stand(still=False)
                    result = asyncio.run(measure(server, num_clients, prompts, args.tokens))
                    server.stand(still=True)
                    if turn:  # the first round warms up
                        found[num_clients][server.name].append(result)
    summary = {}
    for num_clients, by_name in found.items():
        first = next(iter(by_name.values()))
        for name, rounds in by_name.items():
            medians = {key: round(statistics.median(one[key] for one in rounds), 2) for key in rounds[0]}
            ratios = sorted(
                one["tokens_per_s"] / other["tokens_per_s"] for one, other in zip(rounds, first, strict=True)
            )
            medians["tokens_per_s_ratio"] = round(statistics.median(ratios), 3)
            medians |= {"lowest_ratio": round(ratios[0], 3), "highest_ratio": round(ratios[-1], 3)}
            summary[f"{name}, {num_clients} clients"] = medians
            sys.stdout.write(f"{name}, {num_clients} clients: {medians}\n")
    sys.stdout.write(json.dumps({"rounds": args.rounds, "answers": args.answers, "result": summary}) + "\n")


if __name__ == "__main__":
    main()
