"""promoe_ds/recipes/README.md against the recipes: every name loads, every size is exact, nothing is left out."""

from __future__ import annotations

import re

import pytest
import yaml

from promoe_ds.config.decode import encode
from promoe_ds.costs import flops
from promoe_ds.recipes.load import RECIPES, load_config, recipe_names

PAGE = (RECIPES / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\|[^|]+\| `(?P<recipe>[\w/]+)` \| (?P<total>[\d,]+) \| (?P<activated>[\d,]+) \|", re.MULTILINE)
TREE = yaml.safe_load((RECIPES.parents[1] / "benchmarks/paper_tables.yaml").read_text(encoding="utf-8"))
SIZES = sorted({m.groups() for m in ROW.finditer(PAGE)})
ABLATIONS = {
    "promoe_b_prototypes": {"moe.conditional": False, "moe.router.contrastive_weight": 0.0},
    "promoe_b_no_split": {"moe.conditional": False},
    "promoe_b_softmax": {"moe.router.activation": "softmax"},
    "promoe_b_sigmoid": {"moe.router.activation": "sigmoid"},
    "promoe_b_load_balance": {"moe.router.balance_weight": 0.001},
    "promoe_l_top3": {"moe.router.top_k": 3},
    "kmeans_b_no_split": {"moe.conditional": False},
    **{f"promoe_b_ddpm_lambda{n}": {"moe.router.contrastive_weight": float(n)} for n in (1, 2, 5)},
    **{f"promoe_l_e{n}": {"moe.num_experts": n - 2} for n in (4, 6, 8, 10, 12, 16)},
    **{f"{family}_1m": {"train.steps": 1_000_000} for family in ("dense_l", "dense_xl", "promoe_l", "promoe_xl")},
    **{f"{family}_2m": {"train.steps": 2_000_000} for family in ("dense_l", "promoe_l")},
    "promoe_xl_2m": {"train.steps": 2_000_000, "sample.cfg": 4.0},
    **{f"{family}_l_ddpm": {"diffusion.name": "ddpm"} for family in ("tc", "ec", "diffmoe")},
}
"""recipe in paper/ -> all that may differ from its base"""


def flat(tree: object, path: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: v for name, item in tree.items() for key, v in flat(item, f"{path}.{name}".lstrip(".")).items()}


@pytest.mark.parametrize(("recipe", "total", "activated"), SIZES)
def test_a_row_names_a_recipe_and_its_exact_size(recipe: str, total: str, activated: str) -> None:
    count = flops.count_parameters(load_config(recipe))
    assert (f"{count.total:,}", f"{count.activated:,}") == (total, activated)


def test_every_recipe_is_on_the_page_and_every_table_too() -> None:
    named = {recipe for recipe, *_ in SIZES}
    ours = {name for name in recipe_names() if name.startswith(("paper/", "imagenet256_"))}
    assert named == ours and len({name.rsplit("/")[-1] for name in ours}) == len(ours), (
        "run folders go by the last part"
    )
    assert re.findall(r"^### Table (\d+):", PAGE, re.MULTILINE) == [str(n) for n in range(1, 14)]
    for figure in ("3(a) and 7", "3(b) and 8", "3(c) and 9"):
        assert f"### Figures {figure}:" in PAGE
    assert all(f"`{name}`" in PAGE for name in recipe_names() if name.startswith("digits"))


@pytest.mark.parametrize("number", [n for n in TREE["tables"] if n.isdigit()])
def test_the_figures_are_those_of_the_benchmark(number: str) -> None:
    """The paper's FID and IS, row by row; the benchmark's copy was made apart from the page's."""
    section = re.split(rf"^### Table {number}:", PAGE, flags=re.MULTILINE)[1].split("###")[0]
    cells = [line.strip("|").split("|")[4:] for line in section.splitlines() if ROW.match(line)]
    page = [[float(cell) for cell in row] for row in cells]
    rows = [row["paper"] for row in TREE["tables"][number]["rows"].values() if row["paper"] and "from" not in row]
    assert page == [[v for scale in sorted(paper) for v in paper[scale]] for paper in rows]


def test_all_ablations_are_listed_here() -> None:
    assert {f"paper/{name}" for name in ABLATIONS} == {name for name in recipe_names() if name.startswith("paper/")}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_its_base_in_what_it_ablates(name: str) -> None:
    base = re.sub(r"_(prototypes|no_split|softmax|sigmoid|load_balance|top3|lambda\d|e\d+|\dm)$", "", name)
    base = base.removesuffix("_ddpm") if name.endswith("_ddpm") else base
    ours, theirs = (flat(encode(load_config(recipe))) for recipe in (f"paper/{name}", f"imagenet256_{base}"))
    assert ours.keys() == theirs.keys()
    assert {key: v for key, v in ours.items() if v != theirs[key] and key != "name"} == ABLATIONS[name]
