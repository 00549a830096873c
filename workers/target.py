"""Which class a user means by `module:Class`: imported from the current folder, as Python would with `-m`.

In: text from a command line. Out: a `Worker` class, or an error that says what is there instead.
"""

import inspect
import sys
import traceback
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
    except Exception as error:
        raise UnknownTarget(f"{text}: {type(error).__name__}: {error}{_place(error, here)}") from error
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, Worker)):
        there = [name for name, value in vars(module).items() if _is_worker_of(value, module.__name__)]
        raise UnknownTarget(f"{text}: {module_name} has no Worker class {class_name!r}; it has {there or 'none'}")
    return found


def check_constructor(text: str, worker_type: type[Worker]) -> None:
    """That a bus is all that the class needs. Raises `UnknownTarget` that says what else its constructor takes."""
    try:
        inspect.signature(worker_type).bind(None)
    except TypeError as error:
        raise UnknownTarget(
            f"{text}: TypeError: {error}; pass what the constructor takes besides the bus in a program of your own, "
            f"with workers.process.run({worker_type.__name__}, ...)"
        ) from None


def _place(error: Exception, folder: str) -> str:
    """Where in the user's own folder it was raised, for a message."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _is_worker_of(value: object, module_name: str) -> bool:
    return inspect.isclass(value) and issubclass(value, Worker) and value.__module__ == module_name
