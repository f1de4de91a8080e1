"""Results by key in a file of JSON lines: each is asked for once, and an interrupted command goes on."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from openai import BadRequestError
from rich.progress import track

from evaluation.client import PARALLEL

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def read(path: Path, load: Callable[[dict[str, Any]], Found], what: str) -> dict[str, Found]:
    """Return what was kept, by key; nothing where there is no file.

    Args:
        path: the file.
        load: makes a result of what stands in a line beside its key.
        what: names a result, for errors.

    Raises:
        ValueError: naming file and line of what is no such result.
    """
    done = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            done[key] = load(entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a {what} of this version; choose another --out") from error
    return done


def fill(
    path: Path,
    done: Mapping[str, Found],
    asked: Mapping[str, Asked],
    find: Callable[[Asked], Found],
    dump: Callable[[Found], dict[str, Any]],
) -> dict[str, Found]:
    """Return what is done with what is found of the rest of `asked`, each kept as soon as it and those before it are.

    What the server takes for invalid, such as text that is too long, is not kept, and is asked for again next time.

    Raises:
        OpenAIError: if the server refuses the key or cannot be reached; what was found is kept.
    """

    def found(one: Asked) -> Found | None:
        try:
            return find(one)
        except BadRequestError:
            return None

    missing, whole = [key for key in asked if key not in done], dict(done)
    with ThreadPoolExecutor(PARALLEL) as pool, path.open("a", encoding="utf-8", buffering=1) as file:
        results = pool.map(found, [asked[key] for key in missing])
        for key, result in zip(missing, track(results, path.stem, total=len(missing)), strict=True):
            if result is not None:
                whole[key] = result
                file.write(json.dumps({"key": key, **dump(result)}) + "\n")
    return whole
