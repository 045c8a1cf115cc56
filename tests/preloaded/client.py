"""Asks the server for a `utilgen` on this process's descriptors; takes signals to it, and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
child: list[int] = []
early: list[int] = []  # signals that came before the child


def forward(number: int, _: object) -> None:
    """A signal of ours is the command's."""
    if child:
        os.kill(child[0], number)
    else:
        early.append(number)


def main() -> None:
    for number in FORWARDED:
        signal.signal(number, forward)
    address, *words = sys.argv[1:]
    asked = {"words": words, "directory": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as server, server.makefile("rb") as answers:
        server.connect(address)
        socket.send_fds(server, [b"{"], [0, 1, 2])
        server.sendall(json.dumps(asked).encode()[1:] + b"\n")
        for number in (0, 1, 2):  # a pipe is to be closed when the command closes it
            os.close(number)
        child.append(int(answers.readline()))
        for number in early:
            os.kill(child[0], number)
        code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code >= 0:
        os._exit(code)
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


main()
