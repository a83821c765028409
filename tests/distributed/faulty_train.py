"""launchers/train.py with a data set that fails: run by test_failures.py. The first argument says how."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promoe_ds.utils import signals  # noqa: E402

signals.listen()

from launchers.train import main  # noqa: E402
from promoe_ds.train import trainer  # noqa: E402
from tests.distributed.third_batch import ThirdBatch  # noqa: E402


def fail(drawn: Any) -> Any:
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("a fault of the test")
    return drawn


real = trainer.build_dataset
trainer.build_dataset = lambda config: ThirdBatch(real(config), fail)  # type: ignore[assignment]
sys.exit(main(sys.argv[1:]))
