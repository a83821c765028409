"""benchmarks/image_sources.py: it compares before it times, and fills its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import image_sources
from benchmarks.image_layouts import Item, encoded, picture, write_folders, write_numbered
from tests.data.test_images import write_pack


@pytest.mark.slow
def test_all_sources_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "IMAGENET", 2000)
    monkeypatch.setattr(image_sources, "LARGE", (48, 40))
    monkeypatch.setattr(image_sources, "MANY", {"some zip": image_sources.many_numbered})
    page = tmp_path / "page.md"
    words = ["--data", str(write_pack(tmp_path / "pack.npz")), "--items", "5", "--rounds", "1", "--page", str(page)]
    assert image_sources.main(words) == 0
    text = page.read_text()
    for name in (*image_sources.SOURCES, *image_sources.MANY):
        assert f"| {name} | " in text
    assert text.count("| folder per class | ") == 2 and text.count(" | 2,000 | ") == 1


def test_a_source_of_other_pixels_is_no_source(tmp_path: Path) -> None:
    items: list[Item] = [(f"{i}.png", encoded(picture(i), "png"), i // 2) for i in range(4)]
    paths = {"folder per class": write_folders(tmp_path / "tree", items)}
    image_sources.compare(paths | {"other": write_numbered(tmp_path / "right", items)}, 8)
    wrong = [(name, data, 1 - label) for name, data, label in items]
    other = [*items[:3], ("3.png", encoded(picture(9), "png"), 1)]
    for number, changed in enumerate((wrong, other)):
        with pytest.raises(AssertionError, match="other"):
            image_sources.compare(paths | {"other": write_numbered(tmp_path / str(number), changed)}, 8)
