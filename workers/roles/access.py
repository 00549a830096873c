"""What each role of the `vlm` graph does on the bus: what `nixlbus nats-conf` grants, and nothing more.

In: nothing. Out: `vlm_roles`, as data, so that a deployment's init step imports neither torch nor a model. A test
holds `serves` against what the roles serve; the whole graph answers under a server that is configured by it.
"""

from bus import RoleAccess, Roles, with_people


def vlm_roles(graph: str = "vlm") -> Roles:
    """The roles of docs/architecture.md, and who asks them."""
    return with_people(
        Roles(
            graph=graph,
            roles={
                "frontend": RoleAccess(calls=["generate"]),
                "processor": RoleAccess(serves=["generate"], calls=["decode"]),
                "decode": RoleAccess(serves=["decode"], calls=["prefill"]),
                "prefill": RoleAccess(serves=["prefill"], calls=["encode"], writes_to=["decode"]),
                "encode": RoleAccess(serves=["encode"], writes_to=["prefill"]),
                "traces": RoleAccess(),
                "client": RoleAccess(calls=["generate"], only_asks=True),
            },
        )
    )
