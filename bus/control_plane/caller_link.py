"""What an endpoint knows of the caller whose request it works on: how much it has read, and whether it is still there.

In: credit from the caller of a stream, NATS's own "no responders" for a reply subject without a listener. Out: a wait
for the window to open, and the news that the caller is gone.
A caller that can, says that it goes away (`cancel.<request id>`); one that was killed can't. So its reply subject is
probed: an empty message that asks for nothing, whose undeliverability NATS reports at once.
"""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from bus.control_plane.connection import Connection, Msg
from bus.control_plane.inbox import PROBE, Inbox, is_no_responders
from bus.errors import BusError


class CallerLink:
    """Made for a request of a caller that can be probed; `close` it with the request."""

    def __init__(
        self, connection: Connection, inbox: Inbox, reply_subject: str, window_frames: int, on_gone: Callable[[], None]
    ) -> None:
        """`window_frames` 0: no window. `on_gone` is called once."""
        self.subject = ""  # a denial of somebody's subject is none of ours
        self._connection = connection
        self._reply_subject = reply_subject
        self._window_frames = window_frames
        self._ask_every = max(1, window_frames // 2)
        self._num_read = 0
        self.probed_at_s = -math.inf
        self._on_gone: Callable[[], None] | None = on_gone
        self._opened: asyncio.Future[None] | None = None
        self._listening = ExitStack()
        self._credit_subject = self._listening.enter_context(inbox.listening(self))

    def credit_subject(self, num_sent: int) -> str:
        """The reply subject of the frame after `num_sent` others: where its reader grants more; "" for most."""
        return self._credit_subject if self._window_frames and (num_sent + 1) % self._ask_every == 0 else ""

    async def window(self, num_sent: int) -> None:
        """Return when another frame may be sent."""
        while self._window_frames and num_sent - self._num_read >= self._window_frames:
            self._opened = asyncio.get_running_loop().create_future()
            await self._opened

    def probe(self) -> None:
        """Find out whether the caller still listens, and tell it where to look for us."""
        self.probed_at_s = time.monotonic()
        if not self._reply_subject.startswith("_INBOX."):
            return  # not an inbox: what listens there can't be known, and is not to be written to
        with suppress(BusError):
            self._connection.publish_now(self._reply_subject, b"", reply=self._credit_subject, headers=PROBE)

    def take(self, message: Msg) -> None:
        """Credit, or that there is nobody."""
        if is_no_responders(message):
            gone, self._on_gone = self._on_gone, None
            if gone:
                gone()
        elif message.data.isdigit() and len(message.data) < 16:
            self._num_read = max(self._num_read, int(message.data))
            if self._opened is not None and not self._opened.done():
                self._opened.set_result(None)

    def fail(self, error: BusError) -> None:
        """Our own connection is lost: the deadline bounds what goes on."""

    def close(self) -> None:
        """Listen no more."""
        self._on_gone = None
        self._listening.close()
