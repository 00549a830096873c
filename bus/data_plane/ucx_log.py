"""What UCX tells only in its log, read out of it.

In: the log of a process that ran with UCX_LOG_LEVEL=info. Out: the lanes of its last endpoint to another process, and
UCX's version. Pure. Source: `ucp_worker_print_used_tls` and `ucp_context_version_check` of UCX.
"""

import re
from collections.abc import Mapping

_LANES = re.compile(r"(in(?:tra|ter)-node) cfg#\d+ +(.*)$", re.MULTILINE)
_VERSION = re.compile(r"INFO +Version (\S+)")


def log_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, changed so that UCX writes what we read, on stderr, whatever log its user has asked for."""
    return {**environ, "UCX_LOG_LEVEL": "info", "UCX_LOG_FILE": "stderr"}


def chosen_lanes(log: str) -> str:
    """UCX's own wording, e.g. `intra-node rma_am(tcp/lo) am(tcp/lo cma/memory)`; "" if the log names none.

    Of several the last: an endpoint is told of anew when its wire-up ends with other lanes than it began with.
    """
    told = _LANES.findall(log)
    return " ".join([told[-1][0], *told[-1][1].split()]) if told else ""


def ucx_version(log: str) -> str:
    """UCX's version; "" if the log names none."""
    version = _VERSION.search(log)
    return version.group(1) if version else ""
