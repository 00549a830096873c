from bus.operations import undertakings
from bus.operations.lifecycle import InitiatorEvent
from bus.operations.undertakings import Undertakings
from schemas.operations import (
    AckOutcome,
    CompletionAck,
    Initiator,
    MemoryExtent,
    OperationKind,
    OperationState,
    OperationStatusRequest,
    RdmaMetadata,
    Run,
)

OURS = Initiator(worker_id="initiator", epoch="e1")


def grant(number: int) -> RdmaMetadata:
    return RdmaMetadata(
        operation_id=f"{number:016x}",
        kind=OperationKind.WRITABLE,
        worker_id="target",
        epoch="e0",
        memory=[MemoryExtent(region=0, generation=0, runs=[Run(offset_bytes=0, length_bytes=64)])],
        lease_ms=1000,
    )


async def test_acks_are_remembered_up_to_a_bound() -> None:
    table = Undertakings(OURS)

    def told(number: int) -> OperationState:
        query = OperationStatusRequest(operation_id=f"{number:016x}", worker_id="target", epoch="e0", initiator=OURS)
        return table.answer(query).state

    for number in range(undertakings.MAX_CONCLUDED + 1):
        undertaking = table.begin(grant(number))
        undertaking.move(InitiatorEvent.POST)
        assert number or told(number) is OperationState.UNDER_WAY
        undertaking.ack = CompletionAck(
            operation_id=f"{number:016x}", outcome=AckOutcome.COMPLETE, initiator=OURS, token=bytes(16)
        )
        undertaking.move(InitiatorEvent.END)
    assert table.num_open == 0
    assert told(1) is told(undertakings.MAX_CONCLUDED) is OperationState.CONCLUDED
    assert told(0) is OperationState.REFUSED  # forgotten; and it will not touch the memory, which is true
