"""What is measured: a server that runs, or one that is started for a checkpoint or a model and stopped afterwards."""

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from openai import APIStatusError, BadRequestError, UnprocessableEntityError
from transformers import PreTrainedTokenizerBase

from evaluation import scores
from evaluation.client import Server
from evaluation.rows import Row
from model import checkpoint
from model.pretrained import NAMED, local, sha256_of

READY_S = 600.0
"""How long a server may take until it is ready; the first start fetches weights."""
STOP_S = 30.0
"""How long it may take to stop, before it is killed."""
UNWATCHED = ("--checkpoint", "none", "--input-mode", "off", "--output-mode", "off")
"""What serves a plain model."""
LISTENING = ("--host", "127.0.0.1", "--port", "0", "--log-level", "info")
"""Where a started server listens: at a port that it takes itself, as one found free before may be taken until then."""
READY = re.compile(r"ready at (http://\S+)/v1")
"""What its log says once it is ready."""
WEIGHTS = (
    *("*.safetensors", "*.bin", "*config.json", "tokenizer.json", "*.jinja"),
    *("adapter/*.safetensors", "adapter/*config.json"),
)
"""The files of a folder that say what it serves."""
TOLD = ("id", "owned_by", "root", "max_model_len")
"""What a list of models says of one that stays the same when the server starts again, as far as it says it."""
COUNTED = "naïvely re-tokenised: for (i = 0; i < 1024; i++) { sum += values[i]; } Größe 3.14159, Привет, 北京, end"
"""Text that tokenizers cut in different ways."""
SERVER = "server.json"
"""What a server tells of itself, in the folder of what came from it."""
KINDS = "http://ADDRESS, checkpoint:PATH or hub:NAME"


@contextmanager
def serving(target: str, model: str, log: Path) -> Iterator[str]:
    """Yield the address of a server of the target.

    Args:
        target: an address; `checkpoint:` and a safety checkpoint of `model`; or `hub:` and a plain model, which is
            served without a signal. Settings of the environment hold for both.
        model: the model under a checkpoint.
        log: file of what a started server says.

    Raises:
        ValueError: if it is none of these.
        OSError: if the server does not come up; the message has the end of its log.
    """
    kind, _, name = target.partition(":")
    if kind in ("http", "https"):
        yield target
        return
    if kind not in ("checkpoint", "hub") or not name:
        raise ValueError(f"a target is {KINDS}, got {target!r}")
    words = ["--model", model, "--checkpoint", name] if kind == "checkpoint" else ["--model", name, *UNWATCHED]
    command = [sys.executable, "-m", "server", *LISTENING, *words]
    with log.open("a", encoding="utf-8") as file:
        start = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            yield _address(process, log, start)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_address(target: str) -> bool:
    """Tell whether a target is a server that runs, of which no more is known than it tells."""
    return target.startswith(("http://", "https://"))


def told(server: Server) -> dict[str, Any]:
    """Return what a server tells of what it serves: its list of models, and what it shows of its risks to this caller.

    Thresholds are told to those who see exact risks; servers that show none look alike under one name.

    Raises:
        OpenAIError: if the server refuses the key or cannot be reached.
    """
    listed = next(one.model_dump() for one in server.client.models.list().data if one.id == server.model)
    found: dict[str, Any] = {"shows": "nothing", "thresholds": None}
    try:
        found = scores.post(*server, Row("probe", scores.PROBE, None, 0), _shown)
    except APIStatusError as error:
        scores.require_final(error)
    except ValueError:
        pass
    return {name: listed[name] for name in TOLD if name in listed} | found


def _shown(answer: dict[str, Any]) -> dict[str, Any]:
    return {"shows": "flags" if answer["request_risk"] is None else "risks", "thresholds": answer["thresholds"]}


def require_tokenizer(server: Server, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """See that a server counts tokens as a tokenizer does, as far as it tells how many a request has.

    Two requests that begin and end alike are compared, so the chat template does not count.

    Raises:
        OpenAIError: if it refuses the key or cannot be reached.
        ValueError: if it counts otherwise.
    """

    def told(text: str) -> int | None:
        messages: list[Any] = [{"role": "user", "content": text}]
        try:
            answer = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=1)
        except (BadRequestError, UnprocessableEntityError):
            return None
        return answer.usage.prompt_tokens if answer.usage is not None else None

    short, long = "end", f"end, {COUNTED}"
    ours = len(tokenizer.encode(long)) - len(tokenizer.encode(short))
    first, second = told(short), told(long)
    if first is not None and second is not None and second - first != ours:
        raise ValueError(
            f"the server counts {second - first} tokens where the tokenizer of {name} counts {ours}: "
            "name that of the served model with --tokenizer, or with `tokenizer` in the suite"
        )


def fingerprint(target: str) -> str | None:
    """Return what changes with the weights of a target that is started; None for a server that runs.

    It is a SHA-256 over the files of a checkpoint, which names the one base that it fits, or of a plain model; the
    commit of a model of the Hub, or None where the Hub's cache does not hold it.

    Raises:
        ModelError: if there is nothing by that name.
    """
    kind, _, name = target.partition(":")
    if kind == "checkpoint":
        return _of_files(checkpoint.find(name))
    if kind != "hub":
        return None
    if name in NAMED:
        return NAMED[name].sha256
    path = local(name)
    if path is None:
        found = try_to_load_from_cache(name, "config.json")
        return Path(found).parent.name if isinstance(found, str) else None
    return sha256_of(path) if path.is_file() else _of_files(path)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of a tokenizer's vocabulary: those with the same one count alike, whatever they are called."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _of_files(folder: Path) -> str:
    """Return a SHA-256 over the files that say what a folder serves."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _address(process: "subprocess.Popen[bytes]", log: Path, start: int) -> str:
    """Return where a started server listens, once it is ready, as its log says from byte `start` on.

    Raises:
        OSError: if it ends before that, or takes too long.
    """
    deadline = time.monotonic() + READY_S
    is_running, said = True, ""
    while is_running and time.monotonic() < deadline:
        is_running = process.poll() is None
        said = log.read_bytes()[start:].decode(errors="replace")
        if is_running and (found := READY.search(said)):
            return found[1]
        time.sleep(0.2)
    end = " ".join(said.strip().splitlines()[-3:])
    raise OSError(f"the server did not start: {end} (all of it in {log})")
