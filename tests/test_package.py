"""What an installed package holds: the launchers as commands, the DeepSpeed files, the recipes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from promoe_ds.config import ConfigError
from promoe_ds.parallel.ds_config import find
from tests.launch import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PARTS = ("promoe_ds", "evaluation", "launchers", "ds_configs", "pyproject.toml", "requirements.txt", "README.md")


def test_every_package_is_listed() -> None:
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for f in ("promoe_ds", "evaluation")
        for p in (ROOT / f).rglob("*.py")
    }
    mapped = {"promoe_ds.cli", "promoe_ds.ds_configs"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | mapped


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_every_command_exists(command: str) -> None:
    module, _, function = PROJECT["project"]["scripts"][command].partition(":")
    text = (ROOT / "launchers" / f"{module.removeprefix('promoe_ds.cli.')}.py").read_text(encoding="utf-8")
    assert f'def {function}() -> None:\n    """The command {command}' in text


def test_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", tmp_path, source], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        scripts = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        wheel.extractall(tmp_path / "site")
    expected = {
        p.relative_to(ROOT / "promoe_ds") for p in (ROOT / "promoe_ds").rglob("*.*") if p.suffix in (".py", ".yaml")
    }
    expected |= {Path("cli", p.name) for p in (ROOT / "launchers").glob("*.py")}
    expected |= {Path("ds_configs", p.name) for p in (ROOT / "ds_configs").glob("*.json")}
    assert {f"promoe_ds/{path}" for path in expected} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "launchers", "benchmarks"))]
    assert "promoe-train = promoe_ds.cli.train:console" in scripts
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from promoe_ds.cli import train; import promoe_ds\n"
        "assert 'site' in promoe_ds.__file__ and 'torch' not in sys.modules\n"
        "sys.exit(train.main(['--dry-run', '--json', '--ds_config', 'zero2', '--world', '2']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, tmp_path / "site"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0 and '"stage": 2' in done.stdout, done.stderr[-2000:]


def test_shipped_files_by_name() -> None:
    assert find("zero2") == str(ROOT / "ds_configs" / "zero2.json")
    assert find("ds_configs/zero2.json") == "ds_configs/zero2.json"
    with pytest.raises(ConfigError, match="no such file is shipped .known: zero0, zero1, zero2, "):
        find("zero7")
