"""launchers/analyze.py on runs of a few steps: the folder, the page, and every mistake a user can make."""

from __future__ import annotations

import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launchers import analyze
from promoe_ds.utils.command_line import guarded
from tests.browser import CHROMIUM, open_page
from tests.launch import run, torchrun

SMALL = ("--images", "24", "--tokens", "120", "--maps", "2", "--batch", "12")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    steps = ("train.steps=2", "train.checkpoint_every=2", "parallel.expert_parallel=1")
    work = [("promoe", "zero0", *steps), ("dense", "zero0", "moe=null", *steps)]
    run(torchrun(1, "tests/distributed/train_worker.py", str(folder), json.dumps(work)))
    return folder


def call(*words: object) -> int:
    return guarded(analyze.analyze, [str(word) for word in words])


FETCHED = ("src", "href", "xlink:href", "srcset", "data", "action", "formaction", "poster", "background", "ping")


class Links(HTMLParser):
    """Everything a browser would fetch, and tags that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for key, value in attrs if key in FETCHED]
        assert not any(key.startswith("on") or key == "http-equiv" for key, _ in attrs)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        assert tag not in ("script", "iframe", "object", "embed")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> None:
    page = Links()
    page.feed(text)
    assert page.open == [] and page.targets
    for target in page.targets:  # nothing leaves the page, and no link leads nowhere
        assert target.startswith("data:") or (target[0] == "#" and target[1:] in page.ids), target[:80]
    assert "url(" not in text and "@import" not in text and "width=device-width" in text


@pytest.fixture(scope="module")
def out(runs: Path) -> Path:
    assert call("--run", runs / "promoe", "--compare", runs / "dense", *SMALL) == 0
    return runs / "promoe" / "analysis"


def test_report_of_a_run_and_a_comparison(runs: Path, out: Path) -> None:
    text = (out / "report.html").read_text()
    check_page(text)
    for section in ("Training", "Numbers", "Who uses which expert", "Token maps", "Tokens", "Diversity", "Comparison"):
        assert f"<h2>{section}</h2>" in text
    pictures = {path.stem: Image.open(path).size for path in out.glob("*.png")}
    assert {"load", "explained", "maps_by_timestep", "tsne_by_expert", "diversity", "prototypes"} <= pictures.keys()
    assert text.count("data:image/png") == len(pictures) and all(width >= 60 for width, _ in pictures.values())
    with (out / "use_by_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    edges = sum(int(value) for row in rows for key, value in row.items() if key.startswith("expert_"))
    assert len(rows) == 2 * 10 and edges == 2 * 24 * 5 * 16  # layers, images, timesteps, tokens
    compared = (out / "comparison.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in compared] == ["run", "promoe", "dense"]
    assert call("--run", runs / "promoe", "--dry-run") == 0  # an earlier report may be replaced


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_report_asks_for_nothing_and_complains_of_nothing(out: Path, tmp_path: Path) -> None:
    """In a real browser, at the widths of a desktop and a phone; and a page that does both is found out."""
    page = (out / "report.html").read_bytes()
    for width in (1280, 390):
        opened = open_page(page, tmp_path, (width, 1600))
        assert opened.requests == [] and opened.console == []
        assert len(np.unique(np.asarray(Image.open(opened.screenshot).convert("L")))) > 50
    bad = b"<img src='http://one.test/a'><img src='https://two.test/b'><script>console.error('oops')</script>"
    opened = open_page(page + bad, tmp_path, (390, 800))
    assert {"http://one.test/a", "CONNECT two.test:443"} <= set(opened.requests) and "oops" in opened.console[0]


def test_a_dense_model_says_that_it_has_no_experts(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--model", runs / "dense", "--out", tmp_path / "out", *SMALL) == 0
    assert f"report: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text()
    check_page(text)
    assert "A dense model: there are no experts to see" in text and "inter/intra k-means" in text
    assert not (tmp_path / "out" / "load.png").exists()


def test_dry_run_writes_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--run", runs / "dense", "--out", tmp_path / "new", "--dry-run") == 0
    assert "512 images at 5 timesteps\nwould write" in capsys.readouterr().out and not (tmp_path / "new").exists()


MISTAKES = [
    (("--run", "{runs}/none"), "--run={runs}/none: no such file or folder; name a run folder"),
    (("--model", "{runs}/promoe"), "--out: --model has no run folder to write to; add --out DIR"),
    (("--run", "{runs}/promoe", "--compare", "{runs}/none"), "--compare={runs}/none: no such file or folder;"),
    (("--run", "{runs}/promoe", "--compare", "{runs}/promoe"), "--compare: a model is named twice; name each once"),
    (
        ("--run", "{runs}/promoe", "--out", "{runs}"),
        "--out={runs}: holds files but no files.json of a report; name an empty",
    ),
    (("--run", "{runs}/promoe", "--out", "{runs}/promoe/config.yaml"), "is not a folder; name another one"),
    (("--run", "{runs}/promoe", "--timesteps", "a"), "--timesteps='a': is not a list of numbers; write"),
    (("--run", "{runs}/promoe", "--timesteps", "1,2000"), "--timesteps='1,2000': leaves the range of timesteps"),
    (("--run", "{runs}/promoe", "--images", "1"), "--images=1: is too small; choose 2 or more"),
    (("--run", "{runs}/promoe", "--seed", "-1"), "--seed=-1: must lie in [0, 2**32); choose such a number"),
    (("--run", "{runs}/promoe", "--subspace", "99"), "--subspace=99: an expert's matrices have 32 singular vectors"),
    (("--run", "{runs}/promoe", "--data", "x"), "--data=x: the model was trained on the embedded digits; leave it"),
    (("--run", "{runs}/promoe", "--bogus"), "unrecognized arguments: --bogus; see --help"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: str(value)[-40:])
def test_mistakes(runs: Path, words: tuple, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(runs.rglob("*"))
    assert call(*(word.format(runs=runs) for word in words)) == 2
    text = capsys.readouterr().err
    assert re.search(r"^error: ", text, re.M) and message.format(runs=runs) in text
    assert text.strip().splitlines()[-1].startswith("error: ") and sorted(runs.rglob("*")) == before


@pytest.mark.parametrize("damage", ["{", "[]", '{"sets": 5}', '{"sets": [{}]}', '{"sets": [{"samples": null}]}'])
def test_damaged_scores_are_told_before_the_work(
    runs: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(runs / "promoe/checkpoints")
    (run / "metrics.json").write_text(damage)
    assert call("--run", run, "--dry-run") == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: --run={run}/metrics.json: holds no scores (") and text.count("\n") == 1


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        analyze.parser().parse_args(["--help"])
    assert done.value.code == 0 and "python launchers/analyze.py --run runs/digits" in capsys.readouterr().out
    assert sys.modules[analyze.__name__].__doc__
