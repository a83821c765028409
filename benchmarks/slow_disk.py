"""launchers/train.py on a slow disk: what chaos.py starts, so that a blow during a save meets one.

Every file of a checkpoint lies half written for SLOW_DISK_SECONDS. A rank says "connected" once its watchdog is up:
from then on its end must be told by name.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from promoe_ds.utils import signals

signals.listen()

from launchers.train import main, prepare_environment  # noqa: E402

prepare_environment()  # before torch, as the launcher does

from promoe_ds.checkpoint import save  # noqa: E402
from promoe_ds.train import trainer  # noqa: E402

write_tensors, connect = save.write_tensors, trainer.connect


def write_slowly(path: Path, tensors: Any, metadata: dict[str, str]) -> dict[str, Any]:
    write_tensors(path, tensors, metadata)
    os.truncate(path, path.stat().st_size // 2)
    time.sleep(float(os.environ["SLOW_DISK_SECONDS"]))
    return write_tensors(path, tensors, metadata)


def connect_aloud(*arguments: Any) -> None:
    connect(*arguments)
    print("connected", flush=True)


save.write_tensors, trainer.connect = write_slowly, connect_aloud
sys.exit(main(sys.argv[1:]))
