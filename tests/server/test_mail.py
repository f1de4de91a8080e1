"""What the worker tells jobs: all of a step at once, in order, and to nobody in vain."""

import asyncio

from model.chat import EncodedPrompt
from server.engine.jobs import Items, Job, Mail


def job(name: str) -> Job[object]:
    return Job(name, EncodedPrompt((1,)), lambda lm: iter(()))  # type: ignore[arg-type]  # it never begins


def test_all_that_a_step_gave_is_handed_over_at_once_and_in_order(monkeypatch):
    async def run() -> None:
        loop = asyncio.get_running_loop()
        calls, call = [], loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(args) or call(*args))
        forgotten: list[Job[object]] = []
        one, two, dropped = job("one"), job("two"), job("dropped")
        mail = Mail(loop, forgotten.append)
        mail.tell(one, "a")
        mail.tell(two, "b")
        mail.tell(one, "c")
        mail.end(one, "last")
        mail.end(dropped)
        mail.send()
        mail.send()
        assert len(calls) == 1
        assert [item async for item in Items(one)] == ["a", "c", "last"]
        assert two.outbox.get_nowait() == "b"
        assert dropped.outbox.empty()
        assert forgotten == [one, dropped]

    asyncio.run(run())


def test_where_nobody_listens_any_more_jobs_end():
    loop = asyncio.new_event_loop()
    loop.close()
    one = job("one")
    mail = Mail(loop, lambda job: None)
    mail.tell(one, "a")
    mail.send()
    assert one.is_aborted
