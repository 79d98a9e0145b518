"""The limit on replies that clients have not read yet."""

from __future__ import annotations

import asyncio

import pytest

from fovea.service.access.caller import Caller
from fovea.service.errors import Overloaded
from fovea.service.grpc.unread_replies import UnreadReplies


def test_callers_have_shares_until_their_tasks_end() -> None:
    async def run() -> None:
        replies, read = UnreadReplies(100), asyncio.Event()

        async def send(caller: str, size: int) -> None:
            replies.add(Caller(caller, ""), size)
            await read.wait()

        def start(caller: str, size: int) -> asyncio.Task[None]:
            return asyncio.create_task(send(caller, size))

        unread = [start("many", 25), start("many", 25)]  # half of the limit
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="have not read 50 bytes"):
            await start("many", 1)
        unread.append(start("few", 30))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="of which 30 are for this caller"):
            await start("few", 4)
        with pytest.raises(Overloaded, match="may take 100"):
            await start("third", 21)
        unread[0].cancel()
        await asyncio.wait(unread[:1])
        await asyncio.sleep(0)
        unread.append(start("third", 21))
        await asyncio.sleep(0)
        read.set()
        await asyncio.gather(*unread[1:])
        await start("few", 1000)  # a single reply is always accepted

    asyncio.run(run())
