"""Imports what is slow to import, then forks a `utilgen` for each client that asks."""

from __future__ import annotations

import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path


def preload() -> None:
    """What utilgen's heavy commands import of other packages, and nothing of utilgen."""
    import open_clip  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import timm  # noqa: F401
    import torch.distributed  # noqa: F401
    import torchmetrics.image.fid  # noqa: F401
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


def serve(address: str) -> list[str]:
    """Returns in a forked child alone: the words of its command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:  # closed: the tests are over
                os._exit(0)
            client, _ = listening.accept()
            if os.fork() == 0:
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return become(client)


def become(client: socket.socket) -> list[str]:
    """Fork once more: the parent tells the client how the child ends; the child is the command."""
    message, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 20)
    asked = json.loads(message)
    child = os.fork()
    if child:
        client.sendall(b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        client.sendall(b"%d\n" % status)
        os._exit(0)
    client.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(asked["directory"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    open_streams()
    words: list[str] = asked["words"]
    return words


def open_streams() -> None:
    """Python's standard streams as a fresh interpreter has them."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    raw = io.FileIO(2, "w", closefd=False)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True
    )


def machine() -> AbstractContextManager[None]:
    """What the command finds: this machine, or what a test asks for (tests/pretend_gpu.py)."""
    asked = os.environ.pop("TEST_MACHINE", None)
    if asked is None:
        return nullcontext()
    from tests.pretend_gpu import MACHINES

    return MACHINES[asked]()


if __name__ == "__main__":
    preload()
    gc.freeze()
    assert threading.active_count() == len(list(Path("/proc/self/task").iterdir())) == 1
    sys.argv = ["utilgen", *serve(sys.argv[1])]
    with machine():
        runpy.run_module("utilgen_cli", run_name="__main__", alter_sys=True)
