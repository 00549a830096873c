"""The roles of the `vlm` graph, one module each; `role_class` finds one by name."""

from importlib import import_module

from workers.roles.graph_worker import GraphWorker

_ROLES = {
    "frontend": "workers.roles.frontend:FrontendWorker",
    "processor": "workers.roles.processor:ProcessorWorker",
    "decode": "workers.roles.decode:DecodeWorker",
    "prefill": "workers.roles.prefill:PrefillWorker",
    "encode": "workers.roles.encode:EncodeWorker",
    "traces": "workers.roles.traces:TracesWorker",
}
GRAPH_ROLES = ("frontend", "processor", "decode", "prefill", "encode")
"""One process each, in the order of a request's way."""


def role_names() -> list[str]:
    """Every role that `nixlbus worker` can run."""
    return list(_ROLES)


def role_class(name: str) -> type[GraphWorker]:
    """The class of a role; its module is imported now. Raises `KeyError` for an unknown name."""
    module, _, attribute = _ROLES[name].partition(":")
    worker_class: type[GraphWorker] = getattr(import_module(module), attribute)
    return worker_class
