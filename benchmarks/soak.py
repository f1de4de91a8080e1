"""Does the server hold? Many clients of all kinds for half an hour, a third of whom leave in the middle.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/soak.py --minutes 30

Prompts and answers are of mixed lengths, sampled and greedy, streamed and not. The server gets a copy of its checkpoint
whose response thresholds are so low that harmless answers are rolled back all the time, and a small cache, so that
sequences are evicted. It must give no error, hand no client more tokens than it says it released or other text than
theirs, end with every page free, and not grow. The last line of the output is one JSON object; the exit code is 1 if
something did not hold.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
from load import Server, prompt_of, started

LEAVING = 1 / 3
"""Share of the clients that disconnect before the end."""
QUIET_S = 30.0
"""Most time that the server may take to forget the last ones."""
GROWTH = 1.1
"""Most that its memory may grow from a tenth of the time to the end."""


def touchy(checkpoint: Path, folder: Path, block: float) -> Path:
    """Return a copy of a checkpoint that finds nearly every response suspicious."""
    copy = folder / "touchy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "safety_config.json").read_text())
    config["response"] |= {"block": block, "flag": block / 2}
    config["onset"] = block / 2
    (copy / "safety_config.json").write_text(json.dumps(config))
    return copy


def resident_mib(pid: int) -> float:
    """Return the memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def gauge(text: str, name: str) -> float:
    """Return one number out of `/metrics`."""
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))


async def one(http: httpx2.AsyncClient, server: Server, drawn: random.Random, found: Counter[str]) -> None:
    """Ask once, in one of many ways, and note how it ended."""
    streams = drawn.random() < 0.7
    body: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt_of(drawn.randrange(40), drawn.choice([4, 30, 150, 600]))}],
        "max_tokens": drawn.choice([1, 20, 100, 300]),
        "temperature": drawn.choice([0, 0.7, 1.0]),
        "top_p": drawn.choice([1.0, 0.9]),
        "n": drawn.choice([1, 1, 1, 2]),
        "logprobs": True,
        "stream": streams,
    }
    if streams:
        body["stream_options"] = {"include_usage": True}
    leaves_after = drawn.uniform(0, 8) if drawn.random() < LEAVING else None
    asking = ask(http, f"{server.url}/v1/chat/completions", body, found)
    try:
        await asyncio.wait_for(asking, leaves_after)
    except TimeoutError:
        found["left"] += 1


async def ask(http: httpx2.AsyncClient, url: str, body: dict[str, Any], found: Counter[str]) -> None:
    """Send one request; count what came of it, and every answer whose text or number of tokens is not as told."""
    num_tokens, told = 0, -1
    said: dict[tuple[int, str], str] = defaultdict(str)
    of_tokens: dict[tuple[int, str], bytes] = defaultdict(bytes)
    is_whole: dict[tuple[int, str], bool] = defaultdict(lambda: True)  # no token is special, or part of a character
    reasons: list[str] = []
    async with http.stream("POST", url, json=body) as response:
        if response.status_code == 429:
            found["turned away"] += 1
            await asyncio.sleep(1)
            return
        if response.status_code != 200:
            found[f"status {response.status_code}"] += 1
            return
        chunks = []
        if body["stream"]:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
        else:
            chunks.append(json.loads(await response.aread()))
    for chunk in chunks:
        if "error" in chunk:
            found["error in a stream"] += 1
            return
        for choice in chunk["choices"]:
            message, logprobs = choice.get("delta") or choice.get("message") or {}, choice.get("logprobs") or {}
            for field in ("content", "refusal"):
                tokens = logprobs.get(field) or []
                num_tokens += len(tokens)
                place = (choice["index"], field)
                parts = [token["bytes"] for token in tokens]
                is_whole[place] &= None not in parts and not any(token["token"].startswith("<|") for token in tokens)
                of_tokens[place] += b"".join(bytes(part or []) for part in parts)
                said[place] += message.get(field) or ""
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        told = chunk["usage"]["completion_tokens"] if chunk.get("usage") else told
    found["answered"] += 1
    found["rolled back or refused"] += reasons.count("content_filter")
    found["without an end"] += len(reasons) != body["n"]
    found["tokens not as told"] += num_tokens != told
    found["text not of its tokens"] += sum(_is_other(index, said, of_tokens, is_whole) for index in range(body["n"]))


def _is_other(
    index: int,
    said: Mapping[tuple[int, str], str],
    of_tokens: Mapping[tuple[int, str], bytes],
    is_whole: Mapping[tuple[int, str], bool],
) -> bool:
    """Tell whether the text of a choice is not that of its tokens; a refusal is a paragraph of the content too."""
    places = [(index, field) for field in ("content", "refusal")]
    parts = [of_tokens.get(place, b"").decode("utf-8", "replace") for place in places]
    expected = ["\n\n".join(filter(None, parts)), parts[1]]
    return all(is_whole.get(place, True) for place in places) and expected != [said.get(place, "") for place in places]


async def soak(server: Server, num_clients: int, minutes: float) -> tuple[Counter[str], list[float]]:
    """Return how requests ended, and the memory of the server over time, in MiB."""
    found: Counter[str] = Counter()
    memory: list[float] = []
    end = time.monotonic() + 60 * minutes

    async def client(http: httpx2.AsyncClient, number: int) -> None:
        drawn = random.Random(number)
        while time.monotonic() < end:
            try:
                await one(http, server, drawn, found)
            except httpx2.HTTPError as error:
                found[type(error).__name__] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(resident_mib(server.process.pid))
            await asyncio.sleep(60 * minutes / 100)

    async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits(max_connections=None)) as http:
        await asyncio.gather(watch(), *(client(http, number) for number in range(num_clients)))
    return found, memory


def settled(server: Server) -> dict[str, float]:
    """Return what the server still holds once nobody asks for anything any more."""
    deadline = time.monotonic() + QUIET_S
    while True:
        text = httpx2.get(f"{server.url}/metrics").text
        left = {name: gauge(text, f"ballast_{name}") for name in ("requests_running", "requests_waiting")}
        if not any(left.values()) or time.monotonic() > deadline:
            names = ("kv_cache_usage", "evictions_total", "engine_restarts_total", "withdrawn_tokens_total")
            return left | {name: gauge(text, f"ballast_{name}") for name in names}
        time.sleep(0.2)


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/smollm2-135m/all-rows"))
    parser.add_argument("--block", type=float, default=0.2, help="risk that withdraws a response (%(default)s)")
    parser.add_argument("--cache-mib", type=int, default=192, help="of the server (%(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder of the server's log (%(default)s)")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = touchy(args.checkpoint, Path(folder), args.block)
        command = f"soak=ballast-serve --port {{port}} --checkpoint {copy} --kv-cache-mib {args.cache_mib}"
        with started(
            command.replace("ballast-serve", f"{Path(sys.executable).parent}/ballast-serve"), args.logs
        ) as server:
            found, memory = asyncio.run(soak(server, args.clients, args.minutes))
            left = settled(server)
    early, late = memory[len(memory) // 10], memory[-1]
    wrong = {
        kind: count
        for kind, count in found.items()
        if kind.startswith(("status", "error", "without", "tokens", "text"))
    }
    wrong |= {kind: count for kind, count in found.items() if kind.endswith(("Error", "Timeout"))}
    held = not any(wrong.values()) and late < GROWTH * early
    held &= not any(left[name] for name in ("requests_running", "requests_waiting", "kv_cache_usage"))
    held &= not left["engine_restarts_total"] and found["answered"] > 0
    held &= left["withdrawn_tokens_total"] > 0 and left["evictions_total"] > 0  # or it has tested neither
    result = {"held": held, "found": dict(found), "left": left, "mib": {"early": round(early), "late": round(late)}}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(not held)


if __name__ == "__main__":
    main()
