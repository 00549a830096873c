"""What workers tell each other under the shared key, and how each statement is signed and checked.

In: a `KeyRing` and the fields of a message. Out: the signed message; or, for one that arrived, proof of it.
Every field that is acted upon is covered. Pure but for the nonce's randomness.
"""

import secrets
from collections.abc import Sequence
from operator import attrgetter

import msgspec

from bus.errors import AuthenticationError, RemoteProtocolError
from bus.handshake.authentication import KeyRing
from schemas.codec import MessageError, decode, encode
from schemas.handshake import UNSIGNED, AgentDescription, AgentMetadataReply, AgentMetadataRequest
from schemas.operations import (
    UNPROVED,
    ClaimRequest,
    EpochDrained,
    Initiator,
    OperationStatusReply,
    OperationStatusRequest,
    ProcessIdentity,
    ProcessReaped,
    RdmaMetadata,
)

_QUESTION, _ANSWER, _DRAINED, _REAPED = b"question", b"answer", b"epoch drained", b"process reaped"
_GRANT, _CLAIM, _TOKEN, _STATUS, _QUERY = b"grant", b"claim", b"token", b"status", b"query"

_all_but_token = attrgetter(*(field for field in RdmaMetadata.__struct_fields__ if field != "token"))


def question(
    keys: KeyRing, identity: Initiator, process: ProcessIdentity, peer: str, regions: Sequence[int]
) -> AgentMetadataRequest:
    """Ask `peer` who it is."""
    unsigned = AgentMetadataRequest(
        nonce=secrets.token_bytes(16),
        requester=identity.worker_id,
        requester_epoch=identity.epoch,
        process=process,
        regions=list(regions),
    )
    key_id, mac = keys.sign(_QUESTION, peer.encode(), encode(unsigned))
    return msgspec.structs.replace(unsigned, key_id=key_id, mac=mac)


def check_question(keys: KeyRing, request: AgentMetadataRequest, own_id: str) -> None:
    """Whether a member asked, and asked us. Raises `AuthenticationError`."""
    if request.mac == UNSIGNED:
        raise AuthenticationError(
            "the handshake's question is not signed, as workers of protocol version 1 ask it",
            peer=request.requester,
            remedy="upgrade that worker: without a signature it can call, but move no tensors",
        )
    unsigned = msgspec.structs.replace(request, key_id="", mac=UNSIGNED)
    keys.verify((request.key_id, request.mac), _QUESTION, own_id.encode(), encode(unsigned), peer=request.requester)
    if request.process is None:
        raise AuthenticationError("the requester does not say which process it is", peer=request.requester)


def answer(keys: KeyRing, request: AgentMetadataRequest, description: AgentDescription) -> AgentMetadataReply:
    """A description with its proof, for this question alone."""
    packed = encode(description)
    key_id, mac = keys.sign(_ANSWER, request.nonce, request.requester.encode(), packed)
    return AgentMetadataReply(description=packed, key_id=key_id, mac=mac)


def proved_description(
    keys: KeyRing, request: AgentMetadataRequest, reply: AgentMetadataReply, peer: str
) -> AgentDescription:
    """A peer's description, decoded once its proof holds. Raises `AuthenticationError`, `RemoteProtocolError`."""
    parts = (request.nonce, request.requester.encode(), reply.description)
    keys.verify((reply.key_id, reply.mac), _ANSWER, *parts, peer=peer)
    try:
        return decode(reply.description, AgentDescription)
    except MessageError as error:
        raise RemoteProtocolError(f"the peer's description is malformed: {error}", peer=peer) from None


def epoch_drained(keys: KeyRing, identity: Initiator) -> EpochDrained:
    """Our last word."""
    key_id, mac = keys.sign(_DRAINED, identity.worker_id.encode(), identity.epoch.encode())
    return EpochDrained(worker_id=identity.worker_id, epoch=identity.epoch, key_id=key_id, mac=mac)


def check_epoch_drained(keys: KeyRing, message: EpochDrained) -> Initiator:
    """Whose last word it is. Raises `AuthenticationError`."""
    parts = (message.worker_id.encode(), message.epoch.encode())
    keys.verify((message.key_id, message.mac), _DRAINED, *parts, peer=message.worker_id)
    return Initiator(worker_id=message.worker_id, epoch=message.epoch)


def process_reaped(keys: KeyRing, worker_id: str, process: ProcessIdentity) -> ProcessReaped:
    """A supervisor's report."""
    key_id, mac = keys.sign(_REAPED, worker_id.encode(), msgspec.msgpack.encode(process))
    return ProcessReaped(worker_id=worker_id, process=process, key_id=key_id, mac=mac)


def check_process_reaped(keys: KeyRing, message: ProcessReaped) -> None:
    """Whether a member says so. Raises `AuthenticationError`."""
    parts = (message.worker_id.encode(), msgspec.msgpack.encode(message.process))
    keys.verify((message.key_id, message.mac), _REAPED, *parts, peer=message.worker_id)


def grant_token(keys: KeyRing, metadata: RdmaMetadata) -> bytes:
    """What a named grant carries: a proof of all else that it says."""
    return keys.tag(_GRANT, msgspec.msgpack.encode(_all_but_token(metadata)))


def check_grant(keys: KeyRing, metadata: RdmaMetadata) -> None:
    """Whether a member made a named grant. Raises `AuthenticationError`."""
    if not keys.made(metadata.token or b"", _GRANT, msgspec.msgpack.encode(_all_but_token(metadata))):
        raise AuthenticationError(
            "the grant carries no valid proof", peer=metadata.worker_id, operation_id=metadata.operation_id
        )


def claim_request(keys: KeyRing, metadata: RdmaMetadata, initiator: Initiator) -> ClaimRequest:
    """Ask for an open grant, as we have seen it: what was changed on its way is refused."""
    proof = keys.tag(_CLAIM, *_claim_of(metadata, initiator))
    return ClaimRequest(operation_id=metadata.operation_id, epoch=metadata.epoch, initiator=initiator, proof=proof)


def check_claim(keys: KeyRing, request: ClaimRequest, granted: RdmaMetadata) -> None:
    """Whether a member asks for what was granted. Raises `AuthenticationError`."""
    if not keys.made(request.proof, _CLAIM, *_claim_of(granted, request.initiator)):
        raise AuthenticationError("the claim carries no valid proof", peer=request.initiator.worker_id)


def claim_tokens(keys: KeyRing, operation_id: str, epoch: str, initiator: Initiator) -> list[bytes]:
    """What the ack of a claim must carry, under each key; the first is ours to use. It is never sent with the claim."""
    return keys.tags(_TOKEN, *_claim(operation_id, epoch, initiator))


def status_request(keys: KeyRing, request: OperationStatusRequest) -> OperationStatusRequest:
    """A question with its proof: it refuses what was not seen."""
    return msgspec.structs.replace(request, proof=keys.tag(_QUERY, encode(request)))


def check_status_request(keys: KeyRing, request: OperationStatusRequest) -> None:
    """Whether a member asks. Raises `AuthenticationError`."""
    unproved = msgspec.structs.replace(request, proof=UNPROVED)
    if not keys.made(request.proof, _QUERY, encode(unproved)):
        raise AuthenticationError("the status query carries no valid proof", peer=request.worker_id)


def status_reply(keys: KeyRing, request: OperationStatusRequest, reply: OperationStatusReply) -> OperationStatusReply:
    """An answer with its proof, to this question alone."""
    return msgspec.structs.replace(reply, proof=keys.tag(_STATUS, *_status(request, reply)))


def is_status_proved(keys: KeyRing, request: OperationStatusRequest, reply: OperationStatusReply) -> bool:
    """Whether a member answered this question."""
    return keys.made(reply.proof, _STATUS, *_status(request, reply))


def _claim(operation_id: str, epoch: str, initiator: Initiator) -> tuple[bytes, ...]:
    return operation_id.encode(), epoch.encode(), initiator.worker_id.encode(), initiator.epoch.encode()


def _claim_of(metadata: RdmaMetadata, initiator: Initiator) -> tuple[bytes, ...]:
    return msgspec.msgpack.encode(_all_but_token(metadata)), initiator.worker_id.encode(), initiator.epoch.encode()


def _status(request: OperationStatusRequest, reply: OperationStatusReply) -> tuple[bytes, ...]:
    asked = (request.nonce, request.operation_id.encode(), request.worker_id.encode(), request.epoch.encode())
    return *asked, reply.initiator.worker_id.encode(), reply.initiator.epoch.encode(), reply.state.encode()
