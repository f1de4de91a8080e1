"""Results by key in a file of JSON lines: each is asked for once, and an interrupted command goes on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from openai import APIStatusError, BadRequestError
from rich.progress import track

from evaluation import lines
from evaluation.client import PARALLEL

UNJUDGED = "head_failed"
"""Code of the error of a server whose safety head gave no number."""
Asked = TypeVar("Asked")
Found = TypeVar("Found")


def read(path: Path, load: Callable[[dict[str, Any]], Found], what: str) -> dict[str, Found]:
    """Return what was kept, by key, but for a torn last line; nothing where there is no file.

    Args:
        path: the file.
        load: makes a result of what stands in a line beside its key.
        what: names a result, for errors.

    Raises:
        ValueError: naming file and line of what is no such result.
    """
    done = {}
    for number, line in enumerate(lines.whole(path), start=1):
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            done[key] = load(entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a {what} of this version; choose another --out") from error
    return done


def settle(path: Path, facts: dict[str, Any]) -> None:
    """Write what the results in a folder are of, or see that it is the same that was written.

    Raises:
        ValueError: naming what differs, or if there are results of which nothing was written.
    """
    if not path.is_file():
        if any(path.parent.glob("*.jsonl")):
            raise ValueError(f"{path.parent} holds results and no {path.name} that says of what; choose another --out")
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name, value in facts.items() if before.get(name) != json.loads(json.dumps(value))]:
        raise ValueError(f"{path.parent} holds a run with another {', '.join(other)}; choose another --out")


def as_found(find: Callable[[Asked], Found], asked: Sequence[Asked], parallel: int) -> Iterator[tuple[Asked, Found]]:
    """Yield each with what is found of it as soon as it is there, in no order; so many are looked for at a time.

    The first that fails is the end: what has not begun is left, and what has is waited for and yielded.

    Raises:
        Exception: what `find` raised first.
    """
    errors: list[BaseException] = []
    with ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(find, one): one for one in asked}
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if error := future.exception():
                    errors.append(error)
                    for other in futures:
                        other.cancel()
                else:
                    yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
    if errors:
        raise errors[0]


def is_void(error: APIStatusError) -> bool:
    """Tell whether the server takes what was sent for invalid, such as text that is too long, or cannot judge it."""
    return isinstance(error, BadRequestError) or error.code == UNJUDGED


def fill(
    path: Path,
    done: Mapping[str, Found],
    asked: Mapping[str, Asked],
    find: Callable[[Asked], Found | None],
    dump: Callable[[Found], dict[str, Any]],
    parallel: int = PARALLEL,
) -> dict[str, Found]:
    """Return what is done with what is found of the rest of `asked`, each kept as soon as it is there.

    What nothing is found of, or the server takes for void, is not kept, and is asked for again next time.

    Raises:
        OpenAIError: if the server refuses the key or cannot be reached; what was found is kept.
    """

    def found(key: str) -> Found | None:
        try:
            return find(asked[key])
        except APIStatusError as error:
            if is_void(error):
                return None
            raise

    missing, whole = [key for key in asked if key not in done], dict(done)
    lines.mend(path)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        for key, result in track(as_found(found, missing, parallel), path.stem, total=len(missing)):
            if result is not None:
                whole[key] = result
                file.write(json.dumps({"key": key, **dump(result)}) + "\n")
    return whole
