"""The `utilgen` command: its subcommands, and what becomes of errors. No heavy import here."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from . import __version__
from .commands.inputs import look_for_inputs
from .commands.keeping import nothing_kept
from .commands.on_demand import group_on_demand
from .runtime import signals
from .runtime.errors import ExitCode, Stopped, UsageError, UtilgenError, no_memory
from .runtime.ranks import one_process, world

HELP = """Generative data augmentation judged by what it does for the classifier (UtilGen).

Stages read and write WebDataset tar shards and join with pipes:

  utilgen generate -m tiny --per-class 8 | utilgen value score --value value/ | utilgen pairs

Exit codes: 0 done, 1 failed, 2 usage, 65 bad input, 66 no such input, 75 stopped by a signal with
its state saved (run it again; 1 where nothing is kept), 130 interrupted, 141 the
reader left.
--debug shows tracebacks."""

ONE_PROCESS = ("pack", "value train", "pairs", "view", "check")


def _fail(name: str, error: BaseException, options: Mapping[str, Any]) -> typer.Exit:
    """One line on stderr, and the exit that carries the code; `options` are the command's."""
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return typer.Exit(ExitCode.READER_LEFT)
    if isinstance(error, KeyboardInterrupt):
        advice = signals.advice(nothing_kept(name, options))
        print(f"utilgen: {name}: interrupted. {advice}", file=sys.stderr)
        return typer.Exit(ExitCode.INTERRUPTED)
    if not isinstance(error, UtilgenError):
        error = _translate(error, options)
    if world()[0] == 0 or not isinstance(error, UsageError | Stopped):  # not one line a process
        print(f"utilgen: {name}: {error}", file=sys.stderr)
    return typer.Exit(error.exit_code)


def _translate(error: BaseException, options: Iterable[str]) -> UtilgenError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or "output"
        return UtilgenError(str(where), "no space left", "Free some; finished work is kept.")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        where = error.filename or "output"
        return UtilgenError(str(where), error.strerror or "refused", "Name a place you can write.")
    if isinstance(error, OSError) and error.errno is not None:
        return UtilgenError(str(error.filename or "input"), error.strerror or str(error))
    if no_memory(error):
        sizes = [
            f"--{n.replace('_', '-')}" for n in ("batch_size", "chunk", "size") if n in options
        ]
        advice = f"Lower {' or '.join(sizes)}." if sizes else "Give the process more."
        if "accumulation" in options:
            advice = f"{advice[:-1]} and raise --gradient-accumulation by as much."
        if "checkpointing" in options:
            advice = f"Add --gradient-checkpointing, or {advice[0].lower()}{advice[1:]}"
        return UtilgenError("memory", "not enough of it", advice)
    text = str(error).strip().splitlines() or [""]
    why = f"{type(error).__name__}: {text[0]}"
    return UtilgenError("unexpected error", why, "See more with --debug.")


def _drop_stdout() -> None:
    """Nothing more can be written: let the flush at exit go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, _claimed()):
        if stream is not None:
            os.dup2(null, stream.fileno())


def _claimed() -> Any:
    from .runtime import stdout

    return stdout._result


def guard(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """Turn every exception of a command into one line and an exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with signals.running(name, nothing_kept(name, kwargs)):
                if name in ONE_PROCESS:
                    one_process()
                look_for_inputs(name, kwargs)
                function(*args, **kwargs)
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if "UTILGEN_DEBUG" in os.environ and not isinstance(error, BrokenPipeError):
                import traceback

                traceback.print_exception(error)
            raise _fail(name, error, kwargs) from None

    return guarded


COMMANDS = {  # name: where its function stands in `commands`
    "pack": "pack.pack", "invert": "invert.invert", "generate": "generate.generate",
    "pairs": "pairs.pairs", "dpo": "dpo.dpo", "ilpo": "ilpo.ilpo", "eval": "evaluate.evaluate",
    "lora": "lora.lora", "view": "view.view", "check": "check.check",
}  # fmt: skip
VALUE_COMMANDS = {"value train": "value.train", "value score": "value.score"}

app = typer.Typer(
    name="utilgen",
    cls=group_on_demand(COMMANDS, guard),
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
value_app = typer.Typer(
    cls=group_on_demand(VALUE_COMMANDS, guard),
    help="Learn and apply how useful a sample is.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(value_app, name="value")


def _version(value: bool) -> None:
    if value:
        print(f"utilgen {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """See HELP: Typer shows that text."""


def _open_stderr() -> None:
    """After `2>&-` messages go nowhere, and not into a file that is opened as descriptor 2."""
    if sys.stderr is None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.set_inheritable(2, True)
        if null != 2:
            os.close(null)
        sys.stderr = os.fdopen(2, "w")


def main() -> None:
    """Run the command line."""
    _open_stderr()
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ["UTILGEN_DEBUG"] = "1"
    signals.install()
    signals.watch()
    code: Any = None
    try:
        app(prog_name="utilgen")
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of a help text that cannot be written
        code = _fail("help", error, {}).exit_code
    signals.end(code)  # no exception holds what the run had open any more
    sys.exit(code)
