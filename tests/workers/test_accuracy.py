from benchmarks.accuracy import LIMIT, evaluate
from tests.graph_fixture import RunningGraph


async def test_the_held_out_digits_are_read_right_through_the_graph(graph: RunningGraph) -> None:
    right, total = await evaluate(graph.nats_url)
    assert total == 360
    assert right / total >= LIMIT
