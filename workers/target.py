"""Which class a user means by `module:Class`: imported from the current folder, as Python would with `-m`.

In: text from a command line. Out: a `Worker` class, or an error that says what is there instead.
"""

import inspect
import sys
from importlib import import_module
from pathlib import Path

from workers.worker import Worker


class UnknownTarget(ValueError):
    """Text that names no worker's class; the message says why."""


def load_worker(text: str) -> type[Worker]:
    """The class that `text`, such as `pipeline:Resizer`, names. Raises `UnknownTarget`."""
    module_name, colon, class_name = text.partition(":")
    if not colon or not module_name or not class_name:
        raise UnknownTarget(f"{text!r} is not of the form module:Class")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name.removesuffix(".py"))
    except ModuleNotFoundError as error:
        raise UnknownTarget(f"{text}: there is no module {error.name!r} here ({here})") from None
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, Worker)):
        there = [name for name, value in vars(module).items() if _is_worker_of(value, module.__name__)]
        raise UnknownTarget(f"{text}: {module_name} has no Worker class {class_name!r}; it has {there or 'none'}")
    return found


def _is_worker_of(value: object, module_name: str) -> bool:
    return inspect.isclass(value) and issubclass(value, Worker) and value.__module__ == module_name
