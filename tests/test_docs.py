"""The pages: their links lead somewhere, and the files and commands they name exist."""

from __future__ import annotations

import re
import runpy
import tomllib
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from promoe_ds.config.option import options
from promoe_ds.config.schema import ROUTER_CONFIGS, Config, MoEConfig
from promoe_ds.recipes import load as load  # makes the routers known
from tests.launch import ROOT

FOLDERS = ("docs", "benchmarks", "promoe_ds", "ds_configs", "slurm")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
NAMED = re.compile(r"(?<![\w./-])((?:launchers|docs|benchmarks|evaluation|promoe_ds|slurm|tests|ds_configs)/"
                   r"[\w/.-]*\.(?:py|md|json|yaml|sh|sbatch))\b")  # fmt: skip
INLINE = re.compile(r"`([^`\n]+)`")


def prose(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """As GitHub names headings: small letters, punctuation dropped, spaces to dashes."""
    heads = re.findall(r"^#{1,6} (.*)$", prose(page.read_text(encoding="utf-8")), re.M)
    plain = [LINK.sub(lambda m: m[0][m[0].index("[") + 1 : m[0].index("]")], head) for head in heads]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in plain}


def dead_links(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(INLINE.sub("", prose(page.read_text(encoding="utf-8")))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(target)
    return found


def code(page: Path) -> str:
    """What stands between backticks, and in blocks."""
    text = page.read_text(encoding="utf-8")
    return "\n".join([*INLINE.findall(prose(text)), *re.findall(r"^```.*?^```", text, re.S | re.M)])


def missing_files(page: Path) -> list[str]:
    """Paths of this repository that are named as code; one in capitals stands for any."""
    named = {name for name in NAMED.findall(code(page)) if not Path(name).stem.isupper()}
    return sorted(name for name in named if not (ROOT / name).exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page: Path) -> None:
    assert dead_links(page) == [] and missing_files(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b` (c)!\n[x](gone.md) [y](#a-b-c) [z](#nowhere) [w](https://x.y)\n`launchers/gone.py --a`\n")
    assert dead_links(page) == ["gone.md", "#nowhere"] and missing_files(page) == ["launchers/gone.py"]


def test_the_router_of_the_page_is_the_one_that_is_tested() -> None:
    source = (ROOT / "tests/moe/example_router.py").read_text(encoding="utf-8")
    page = (ROOT / "docs/routers.md").read_text(encoding="utf-8")
    assert source[source.index("@register_router") :] in page


def test_the_tables_of_options_are_those_of_the_schema() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "options.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "run python docs/options.py"


@pytest.mark.parametrize("section", ["optimizer", "diffusion", "moe"])
def test_every_option_of_training_is_named_once_with_when_to_use_it(section: str) -> None:
    """As the head of a row or a point; several rows, one for each value, stand together. Routers share options."""
    lines = (ROOT / "docs/training.md").read_text(encoding="utf-8").splitlines()
    cells = [m[1] for line in lines if (m := re.match(rf"(?:\| |- \*\*)(`{section}\..*?)(?: \||\*\*)", line))]
    heads = [name for cell in cells for name in re.findall(rf"`({section}\.[\w.]+)", cell)]
    named = [head for i, head in enumerate(heads) if i == 0 or heads[i - 1] != head]
    ours = [kind for kind in ROUTER_CONFIGS.values() if kind.__module__.startswith("promoe_ds.")]
    configs = [Config(moe=MoEConfig(router=kind())) for kind in ours]
    found = [entry for config in configs for entry in options(config)]
    known = {path for path, _, value in found if path.startswith(f"{section}.") and not is_dataclass(value)}
    assert sorted(named) == sorted(known | ({"moe.router.name"} if section == "moe" else set()))


def test_every_command_and_make_target_that_is_named_exists() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        assert set(re.findall(r"\bpromoe-[a-z]+\b", code(page))) <= scripts.keys(), page
        assert set(re.findall(r"^make ([a-z][\w-]*)", code(page), re.M)) <= targets, page
