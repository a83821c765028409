"""For all tests: Ctrl-C as a terminal has it. A shell's background jobs ignore it, and so would all that they start."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
