"""The installed package, from a wheel or by `make setup`: its commands, the DeepSpeed files, the recipes."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from benchmarks.processes import free_port
from promoe_ds.config.errors import ConfigError
from promoe_ds.parallel.ds_config import find
from tests.launch import ENVIRONMENT, ROOT, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PARTS = ("promoe_ds", "evaluation", "launchers", "ds_configs", "pyproject.toml", "requirements.txt", "README.md")


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_every_command_exists(command: str) -> None:
    module, _, function = PROJECT["project"]["scripts"][command].partition(":")
    text = (ROOT / "launchers" / f"{module.removeprefix('promoe_ds.cli.')}.py").read_text(encoding="utf-8")
    assert re.search(rf"^def {function}\(\)|^main, {function} = launcher\(", text, re.M)


def shell(*command: object, cwd: Path = ROOT) -> str:
    """Output of a command that has neither the checkout nor PYTHONPATH."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    return run([str(word) for word in command], env=environment, cwd=cwd).stdout


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory whose files are called as our folders are, and end whatever imports them."""
    for name in ("evaluation", "launchers", "ds_configs", "slurm", "tests"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was imported')")
    return tmp_path


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_every_command_works_where_make_setup_put_it(command: str, elsewhere: Path) -> None:
    help = shell(Path(sys.executable).with_name(command), "--help", cwd=elsewhere)
    assert help.startswith(f"usage: {command} ")


def test_a_command_by_its_module_passes_over_the_files_of_the_working_directory(elsewhere: Path) -> None:
    """`python -m`, which `torchrun -m` and `deepspeed --module` call, looks there first."""
    assert "usage: " in shell(sys.executable, "-m", "promoe_ds.cli.evaluate", "--help", cwd=elsewhere)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, built from the files that a release consists of."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    sdist = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    shell(sys.executable, "-c", sdist, folder, cwd=source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    shell(*command, "-w", folder, next(folder.glob("*.tar.gz")), cwd=folder)
    return next(folder.glob("*.whl"))


def test_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    expected = {
        p.relative_to(ROOT / "promoe_ds") for p in (ROOT / "promoe_ds").rglob("*.*") if p.suffix in (".py", ".yaml")
    }
    expected |= {Path(p.relative_to(ROOT)) for p in (ROOT / "evaluation").glob("*.py")}
    expected |= {Path("cli", p.name) for p in (ROOT / "launchers").glob("*.py")}
    expected |= {Path("ds_configs", p.name) for p in (ROOT / "ds_configs").glob("*.json")}
    assert {f"promoe_ds/{path}" for path in expected} <= set(names)
    assert not [name for name in names if not name.startswith(("promoe_ds/", "promoe_ds-"))]
    assert "promoe-train = promoe_ds.cli.train:console" in scripts


@pytest.mark.usefixtures("elsewhere")
def test_launchers_start_the_commands_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the packages of this one but not its installation of the project."""
    venv.create(tmp_path / "env", with_pip=False)
    own = Path(
        sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")})
    )
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # nested .pth files are not followed
    commands = tmp_path / "env" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", commands / "python", "install", "--quiet", "--no-deps"]
    shell(*pip, "--no-index", "--force-reinstall", wheel)
    where = "import promoe_ds, sys; assert 'torch' not in sys.modules; print(promoe_ds.__file__)"
    assert shell(commands / "python", "-c", where, cwd=tmp_path).startswith(str(own))
    quick = ("train.steps=3", "train.checkpoint_every=3", "train.global_batch_size=16", "model.depth=2")
    launchers = Path(sys.executable).parent
    deepspeed = (launchers / "deepspeed", "--num_gpus=2", f"--master_port={free_port()}", "--no_python")
    shell(*deepspeed, commands / "promoe-train", "--ds_config", "zero2", *quick, cwd=tmp_path)
    torchrun = (launchers / "torchrun", "--standalone", "--nproc-per-node=2", "--no-python", "--")
    sample = ("--run", "runs/digits", "--num", "4", "--steps", "2", "--out", "out")
    shell(*torchrun, commands / "promoe-sample", *sample, cwd=tmp_path)
    assert (tmp_path / "out" / "samples.npz").exists() and (tmp_path / "out" / "000003_class3.png").exists()


def test_shipped_files_by_name() -> None:
    assert find("zero2") == str(ROOT / "promoe_ds" / "ds_configs" / "zero2.json")
    assert find("ds_configs/zero2.json") == "ds_configs/zero2.json"
    with pytest.raises(
        ConfigError, match="no such file is shipped .known: zero0, zero1, zero2, .*; did you mean 'zero"
    ):
        find("zero7")
