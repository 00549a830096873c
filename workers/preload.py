"""What the fork server imports for every worker, beside the libraries: the roles and what they run on.

Importing must run no tensor operation; a test forks a child from a server that imported this and computes in it.
"""

import contextlib
import importlib

from workers.roles import role_class, role_names

for _role in role_names():
    with contextlib.suppress(ImportError):  # the extra `http` may be missing; only the frontend needs it
        role_class(_role)
importlib.import_module("observability.span_export")
importlib.import_module("uvloop")
