"""A fork server imports the adapter and then forks: nothing may have started torch's threads by then."""

from __future__ import annotations

import subprocess
import sys

SEEN_AT_IMPORT = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Recorder(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(str(operation))
        return operation(*args, **(kwargs or {}))

with Recorder():
    import workers.models
    import workers.models.transformers_adapter
    at_import = list(Recorder.seen)
    torch.ones(2) + 1
print(at_import, len(Recorder.seen) > len(at_import))
"""

WITHOUT_TORCH = """
import sys
import workers.models.images, workers.models.vision_language_model, workers.models.digits_dataset
print([name for name in ("torch", "transformers", "sklearn") if name in sys.modules])
"""


def printed_by(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=90)
    return done.stdout.strip()


def test_importing_the_adapter_runs_no_tensor_operation() -> None:
    assert printed_by(SEEN_AT_IMPORT) == "[] True"


def test_the_seam_needs_neither_torch_nor_transformers_nor_scikit_learn() -> None:
    assert printed_by(WITHOUT_TORCH) == "[]"
