"""A progress bar around a loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def tracked(items: Sequence[T], title: str, unit: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Yield `items` and show on standard error how far it is.

    Args:
        items: what the loop goes over.
        title: what is being done.
        unit: how much one item counts, such as its number of rows.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=_total(items, unit))
        for item in items:
            yield item
            progress.advance(task, unit(item))


def _total(items: Iterable[T], unit: Callable[[T], int]) -> int:
    return sum(unit(item) for item in items)
