"""Which pages of the key-value cache belong to whom. Pure Python: no tensors.

A page holds the keys and values of a fixed number of tokens. It belongs to one sequence, or, full of prompt tokens
that never read `[CLS]`, to every sequence whose prompt begins alike. Shared pages that nobody uses any more stay until
their place is needed, the longest unused first.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence

PAGE_SIZE = 16
"""Tokens of a page."""


def keys_of(token_ids: Sequence[int], salt: str = "") -> list[str]:
    """Return a name for each full page of a prompt, which its tokens, all before them and the salt decide.

    Args:
        token_ids: the prompt.
        salt: keeps the pages of tenants apart, so that none can tell from timing what another asked.
    """
    names, name = [], f"salt: {salt}"  # like the name of no page
    for start in range(0, len(token_ids) - PAGE_SIZE + 1, PAGE_SIZE):
        page = [name, *token_ids[start : start + PAGE_SIZE]]
        name = hashlib.sha256(json.dumps(page).encode()).hexdigest()
        names.append(name)
    return names


class Pages:
    """The pages of one cache, counted from 0.

    Args:
        num_pages: how many there are.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._page_of: dict[str, int] = {}
        self._name_of: dict[int, str] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # shared ones without a user, the longest unused first

    @property
    def num_available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._unused)

    def take(self, count: int) -> list[int] | None:
        """Return this many pages for one user, or None where there are not so many: then none is taken."""
        if count > self.num_available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                self._forget(next(iter(self._unused)))
            page = self._free.pop()
            self._users[page] = 1
            taken.append(page)
        return taken

    def find(self, names: Sequence[str]) -> list[int]:
        """Return the pages of the longest beginning of these names that is there; they have one user more."""
        found = []
        for name in names:
            if (page := self._page_of.get(name)) is None:
                break
            self._users[page] += 1
            self._unused.pop(page, None)
            found.append(page)
        return found

    def num_own(self, pages: Sequence[int]) -> int:
        """Return how many of these pages have one user: what would be available if it gave them back."""
        return sum(self._users[page] == 1 for page in pages)

    def share(self, page: int, name: str) -> None:
        """Offer a full page of prompt tokens to others; where there is one of that name already, that one stays."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name], self._name_of[page] = page, name

    def give_back(self, pages: Sequence[int]) -> None:
        """Take one user from each page; of those that stay for others, the last ones are the first to make room.

        Raises:
            ValueError: if one has none.
        """
        for page in reversed(pages):  # a beginning is found only with all before it
            if self._users[page] < 1:
                raise ValueError(f"page {page} belongs to nobody")
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._name_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def _forget(self, page: int) -> None:
        del self._unused[page]
        del self._page_of[self._name_of.pop(page)]
        self._free.append(page)
