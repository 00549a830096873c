"""Where the packaged checkpoint is. Imports nothing heavy: commands ask for its sample pictures."""

import importlib.resources
from pathlib import Path


def digits_path() -> Path:
    """The folder of the packaged checkpoint. Its card is the README.md in it, pictures to try are in `samples/`."""
    return Path(str(importlib.resources.files("workers.models") / "digits"))
