from bus.data_plane.ucx_log import chosen_lanes, log_environment, ucx_version

LOG = """\
[1795266310.227940] [host:10635:0] ucp_context.c:2753 UCX  INFO  Version 1.23.0 (loaded from libucp.so.0.0.0)
[1795266310.236998] [host:10635:0] ucp_worker.c:1997 UCX  INFO    a self cfg#0 rma_am(tcp/lo)  am(tcp/lo cma/memory)
"""
INTRA = (
    "[1795266310.257328] [host:10635:0] ucp_worker.c:1997 UCX  INFO    a intra-node cfg#1 rma_am(tcp/lo)  ka(tcp/lo)\n"
)
INTER = "[1795266310.257999] [host:10635:0] ucp_worker.c:1997 UCX  INFO    a inter-node cfg#2 rma(rc_mlx5/mlx5_0:1)  \n"


def test_the_lanes_to_another_process_are_told_and_not_those_to_itself() -> None:
    assert chosen_lanes(LOG) == ""
    assert chosen_lanes(LOG + INTRA) == "intra-node rma_am(tcp/lo) ka(tcp/lo)"
    assert chosen_lanes(LOG + INTER) == "inter-node rma(rc_mlx5/mlx5_0:1)"


def test_of_several_the_last_is_told() -> None:
    assert chosen_lanes(LOG + INTRA + INTER).startswith("inter-node")


def test_the_version_is_told_if_it_stands_there() -> None:
    assert ucx_version(LOG) == "1.23.0"
    assert ucx_version("") == ""


def test_the_user_s_own_log_does_not_hide_what_is_read() -> None:
    environ = log_environment({"UCX_LOG_FILE": "elsewhere", "UCX_LOG_LEVEL": "fatal", "UCX_TLS": "tcp"})
    assert environ == {"UCX_LOG_FILE": "stderr", "UCX_LOG_LEVEL": "info", "UCX_TLS": "tcp"}
