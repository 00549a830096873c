"""A launcher of its own for `test_launcher`: forks one child that says what it found imported, and computes."""

import importlib.util
import json
import sys
from multiprocessing.connection import Connection

from workers.launcher import PRELOADED, fork_server


def child(launcher: Connection) -> None:
    imported = [name for name in PRELOADED if name in sys.modules]
    import torch

    torch.set_num_threads(1)
    product = torch.ones(64, 64) @ torch.ones(64, 64)
    launcher.send({"imported": imported, "product": float(product[0, 0]), "threads": torch.get_num_threads()})


def main() -> None:
    context = fork_server()
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(60), "the child hangs"
    print(json.dumps({**ours.recv(), "exist": [bool(importlib.util.find_spec(name)) for name in PRELOADED]}))
    process.join()


if __name__ == "__main__":
    main()
