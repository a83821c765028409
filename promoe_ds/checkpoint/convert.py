"""The same checkpoint in another number of files. The source is never changed.

A checkpoint resumes at any topology as it is, but some file systems prefer fewer or smaller files. Weights alone are
written by `promoe_ds.formats.weights`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from promoe_ds.checkpoint.layout import AVERAGE, EMA, FORMAT, RESUMED_STATES, bytes_of, damage, folder, manifest, size
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.checkpoint.save import complete, write_tensors
from promoe_ds.config.decode import dump
from promoe_ds.config.errors import reject
from promoe_ds.recipes.load import load_tree
from promoe_ds.utils.files import atomic, making, write_text
from promoe_ds.utils.outputs import CONFIG, check_new


def checked(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte has been verified; raises ConfigError."""
    if problem := damage(path, quiet=False):
        reject("checkpoint", path, f"is damaged: {problem}", "use another checkpoint")
    tree = manifest(path)
    if EMA not in tree["files"]:
        reject("checkpoint", path, f"holds no {EMA}: weights alone cannot be converted", "name a checkpoint")
    return tree


@contextmanager
def made(final: Path, need: int) -> Iterator[Path]:
    """A temporary folder to become `final`; raises ConfigError if that exists, or on a full disk."""
    check_new(final, "name another folder")
    temporary = final.with_name(f"tmp_{final.name}")
    try:
        with making(final.parent):
            temporary.mkdir()
            try:
                free = shutil.disk_usage(temporary).free
                if free < need:
                    raise OSError(f"it needs {size(need)}, the disk has {size(free)} free")
                yield temporary
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except FileExistsError:
        reject("--out", temporary, "exists: an interrupted conversion left it, or another is at work", "remove it")
    except (OSError, SafetensorError) as error:
        reject("--out", final, f"cannot be written ({error})", "free space or name another folder")


def resplit(path: Path, run: Path, count: int) -> Path:
    """Write a checkpoint anew with its state in `count` files, as the start of another run folder.

    Returns:
        RUN/checkpoints/step_X; `launchers/train.py --run RUN` continues from there.

    Raises:
        ConfigError: the source is damaged; the target exists or cannot be written; fewer tensors than files.
    """
    check_new(run, "name another folder")
    tree, final = checked(path), folder(run, manifest(path)["step"])
    reader = Reader(path)
    averages = tuple(f"{state}/" for state in reader.averages)
    names = list(dict.fromkeys(key.rsplit("/", 1)[0] for key in reader.where if not key.startswith(averages)))
    if not 1 <= count <= len(names):
        reject("--files", count, f"the state has {len(names)} parameters", f"choose 1 to {len(names)}")
    config = dump(load_tree(tree["config"]))
    metadata = {"format": FORMAT, "config": config, "step": str(tree["step"])}
    with made(final, bytes_of(path) * 101 // 100) as temporary:
        files = {name: entry for name, entry in tree["files"].items() if AVERAGE.fullmatch(name)}
        for name in files:
            with atomic(temporary / name, durable=True) as copy:
                shutil.copyfile(path / name, copy)
        for i in range(count):
            part = {f"{n}/{s}": reader(n, s) for n in names[i::count] for s in RESUMED_STATES}
            files |= write_tensors(temporary / f"state-{i:05d}-of-{count:05d}.safetensors", part, metadata)
        complete(temporary, final, tree | {"files": files})
        write_text(run / CONFIG, config)
    return final
