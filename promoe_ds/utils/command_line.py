"""What the launchers share: misuse in one line, exit codes, stopping by a signal."""

from __future__ import annotations

import argparse
import errno
import math
import os
import platform
import signal
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from promoe_ds._version import __version__
from promoe_ds.config.errors import ConfigError, check_text, did_you_mean, reject
from promoe_ds.config.schema import CacheFormat, DataConfig
from promoe_ds.utils import signals

DONE, USER_ERROR, STOPPED = 0, 2, 85
"""exit codes; after 85 the same command continues, as after `signals.INTERRUPTED` (130), Ctrl-C"""
OTHERS_SECONDS = 30.0
"""how long other ranks let rank 0 speak, and the launcher end them, before they tell the same mistake"""
LOOKED_AT = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""what is met where a path is only looked at, before any reader can say what it was to be"""
_stopped: int | None = None
"""the exit code of the signal that `leave` has heard"""


class Parser(argparse.ArgumentParser):
    """Reports misuse as everything else does: one line, which names the nearest option or choice. Options are written
    out: a typo that begins one is not that one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        option = words[0].partition("=")[0] if words and words[0].startswith("-") else ""
        shown = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        way_out = did_you_mean(option, shown, "see --help", cutoff=0.75)  # the dashes of all are alike
        raise ConfigError(f"{message}; {way_out}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Raises `ConfigError` for text that no record of what was asked for could hold, and for an empty path: a shell
        variable that is not set, which pathlib would take for the current folder."""
        name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
        check_text(name, arg_string)
        if action.type is Path and not arg_string:
            reject(name, '""', "is empty", "name a file or folder")
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse has `suggest_on_error` from Python 3.14 on."""
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0] if action.option_strings else action.dest
            conflict = f"must be one of {', '.join(map(str, action.choices))}"
            reject(name, repr(value), conflict, did_you_mean(value, action.choices))


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises `ConfigError` for the first of these options that is a number below 1."""
    for name in names:
        option, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if isinstance(value, int) and value < 1:
            reject(option, value, "must be positive", "choose 1 or more")


def add_cache_options(p: argparse.ArgumentParser) -> None:
    """`--format`, `--scale` and `--shift`: `data.format`, `data.scale` and `data.shift` of a recipe."""
    formats = ", ".join(typing.get_args(CacheFormat))
    p.add_argument("--format", choices=typing.get_args(CacheFormat), metavar="NAME", help=f"of latents: {formats}")
    for key in ("scale", "shift"):
        help = f"{key} of latents whose format does not say it: one number, or one per channel"
        p.add_argument(f"--{key}", type=float, nargs="+", metavar="X", help=help)


def cache_options(args: argparse.Namespace) -> DataConfig:
    """What `add_cache_options` was given. Raises `ConfigError` for a number that is not finite."""
    for key in ("scale", "shift"):
        if bad := [number for number in getattr(args, key) or () if not math.isfinite(number)]:
            reject(f"--{key}", bad[0], "is not finite", "say a number, or one per channel")
    one = lambda numbers: numbers[0] if numbers and len(numbers) == 1 else numbers and tuple(numbers)  # noqa: E731
    return DataConfig(format=args.format, scale=one(args.scale), shift=one(args.shift))


def own_words(argv: list[str]) -> list[str]:
    """The command line without what launchers add to it."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


def versions() -> dict[str, str]:
    import numpy as np  # late: launchers/train.py parses its words, and sets its threads, before the slow imports
    import torch

    return {
        "promoe_ds": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def mistake(error: ConfigError) -> int:
    """Tell a mistake that several ranks may have met: most likely all of them, so rank 0 tells it. Returns 2."""
    rank = os.environ.get("RANK", "0")
    try:
        began = time.monotonic()
        while rank != "0" and not signals.requested() and time.monotonic() - began < OTHERS_SECONDS:
            time.sleep(0.1)
    except KeyboardInterrupt:  # it does
        return USER_ERROR
    if rank == "0" or not signals.requested():
        print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    return USER_ERROR


def guarded(work: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run `work`, which may return an exit code; a user's mistake and a stop become a line on stderr and another."""
    try:
        return work(argv) or DONE
    except KeyboardInterrupt:
        pass
    except Exception as error:
        if _stopped is None:  # else a library may have made it of the interrupt, as torch does
            if isinstance(error, ConfigError):
                return mistake(error)
            if isinstance(error, OSError) and error.errno in LOOKED_AT:
                text = f"{error.filename}: {error.strerror}; look at its permissions, or name another"
                return mistake(ConfigError(text))
            raise
    signal.setitimer(signal.ITIMER_REAL, 0)
    if os.environ.get("RANK", "0") == "0":
        print("stopped; run the same command again", file=sys.stderr)
    return signals.INTERRUPTED if _stopped is None else _stopped


def _clearing_up() -> bool:
    """Whether an interrupt is on its way through the main thread's `finally` and `except` blocks."""
    error = sys.exception()
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def leave(main: Callable[[], int]) -> NoReturn:
    """Body of `if __name__ == "__main__"`."""
    told = -math.inf

    def stop(number: int, _: object) -> None:
        """Interrupt the work, not what then clears up: launchers pass on what their process group also got."""
        global _stopped
        nonlocal told
        if time.monotonic() - told > signals.REPEAT_SECONDS:
            told = time.monotonic()
            _stopped = signals.INTERRUPTED if number == signal.SIGINT else STOPPED
            signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
            raise KeyboardInterrupt

    def again(*_: object) -> None:
        """Finalizers and libraries lose an interrupt now and then, and the work would go on."""
        if not _clearing_up():
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # people; schedulers and launchers
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, again)
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # gloo's threads now and then abort a rank at interpreter exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def launcher(work: Callable[[list[str]], int | None]) -> tuple[Callable[..., int], Callable[[], NoReturn]]:
    """What every launcher ends with: `main(argv)`, which returns an exit code, and `console()`, the whole process."""

    def main(argv: list[str] | None = None) -> int:
        return guarded(work, sys.argv[1:] if argv is None else argv)

    return main, lambda: leave(main)


def parse_steps(text: str) -> int | str:
    """A number, or ADM's notation of respacing as it stands."""
    try:
        return int(text)
    except ValueError:
        return text


def parse_scales(text: str) -> list[float]:
    """`1,1.5` to [1.0, 1.5]; raises `ConfigError`."""
    way_out = "write numbers of 0 or more, for example 1,1.5,4"
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        reject("--cfg", repr(text), "is not a list of numbers", way_out)
    if any(not math.isfinite(scale) or scale < 0 for scale in scales):
        reject("--cfg", repr(text), "has a scale that is negative or not finite", way_out)
    if len(set(scales)) < len(scales):
        reject("--cfg", repr(text), "names a scale twice", "write each scale once")
    return scales
