"""Small calls between workers that have shaken hands: answered in the subscription's callback, without a queue.

In: a typed message on one of this worker's subjects. Out: the reply, or a fault. For the questions inside an operation
(claim, status), whose answers are looked up and not computed: they carry no headers, since the handshake has settled
the protocol's version, and no span, since they are events of the operation's.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from bus.control_plane.connection import Connection, Msg
from bus.errors import BusError, fault_of
from schemas.codec import MessageError, decode, encode
from schemas.message import Message
from schemas.subjects import Subject, may_be_answered

M = TypeVar("M", bound=Message)

_LOG = logging.getLogger(__name__)


async def serve_peers(
    connection: Connection, worker_id: str, subject: Subject, request_type: type[M], answer: Callable[[M], Message]
) -> None:
    """Answer every request on `subject` until the connection closes; `answer` doesn't block."""

    def reply_to(message: Msg) -> Message:
        try:
            return answer(decode(message.data, request_type))
        except (BusError, MessageError) as error:
            _LOG.info("%s refused a request: %s", subject.template, error)
            return fault_of(error, worker_id=worker_id)
        except Exception as error:
            _LOG.exception("%s failed", subject.template)
            return fault_of(error, worker_id=worker_id)

    def on_message(message: Msg) -> None:
        if may_be_answered(message.reply, subject):
            connection.publish_now(message.reply, encode(reply_to(message)))

    await connection.subscribe(subject, on_message)


def typed(message_type: type[M], callback: Callable[[M], None]) -> Callable[[Msg], None]:
    """A subscription callback for events: decodes, and drops what isn't a `message_type`."""

    def on_message(message: Msg) -> None:
        try:
            event = decode(message.data, message_type)
        except MessageError as error:
            _LOG.warning("a message on %s was dropped: %s", message.subject, error)
            return
        callback(event)

    return on_message
