"""`utilgen`, and `python -m utilgen_cli`: Ctrl-C ends it without a traceback from the start."""

import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until `main` listens: imports take a while

from .app import main  # noqa: E402

if __name__ == "__main__":
    main()
