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


class Faulty:
    """The real data set until its third batch, which on rank 1 fails."""

    def __init__(self, real: Any):
        self.real, self.calls = real, 0

    def __len__(self) -> int:
        return len(self.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def draw(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == 3 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("a fault of the test")
        return self.real.draw(*args)


real = trainer.build_dataset
trainer.build_dataset = lambda config: Faulty(real(config))  # type: ignore[assignment]
sys.exit(main(sys.argv[1:]))
