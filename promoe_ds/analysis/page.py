"""HTML that is one file: pictures inside, no script, no request; wide tables scroll, figures wrap on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

CSS = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 1160px; padding: 12px 16px 48px; color: #1c1f24; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 12px 0 4px; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 36px 0 6px; padding-top: 10px; border-top: 1px solid #d8dce2 }
p { margin: 6px 0; max-width: 75ch }
nav { margin: 10px 0; line-height: 2; display: flex; flex-wrap: wrap; gap: 0 14px }
a { color: #0b57a4 }
code { font-size: .9em; background: #f2f4f7; padding: 1px 4px; border-radius: 3px; overflow-wrap: anywhere }
.figures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start }
figure { margin: 8px 0; max-width: 100% } figure img { max-width: min(100%, 548px); height: auto; display: block }
figure img.wide { max-width: min(100%, 820px) }
figcaption { font-size: .85rem; color: #4a5260; max-width: 60ch }
.table { overflow-x: auto; margin: 8px 0 }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid #e3e6eb; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
th { border-bottom: 2px solid #9aa3b0; vertical-align: bottom }
td.words, th.words { text-align: left; color: #4a5260; white-space: normal; min-width: 220px }
"""


def figure(png: bytes, caption: str, wide: bool = False) -> str:
    """A PNG with what it shows; the caption is its text for those who do not see it, too."""
    data, kind, text = base64.b64encode(png).decode(), ' class="wide"' if wide else "", html.escape(caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{text}"{kind}>'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def figures(*parts: str) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """First column to the left, numbers to the right; with `words`, the last column is prose."""

    def cells(tag: str, values: Sequence[str]) -> str:
        last = len(values) - 1
        kinds = [' class="words"' if words and i == last else "" for i in range(len(values))]
        return "".join(f"<{tag}{kind}>{html.escape(v)}</{tag}>" for kind, v in zip(kinds, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def text(*paragraphs: str) -> str:
    """Paragraphs of plain text; what stands between backticks is code."""
    out = []
    for paragraph in paragraphs:
        parts = html.escape(paragraph).split("`")
        marked = "".join(part if i % 2 == 0 else f"<code>{part}</code>" for i, part in enumerate(parts))
        out.append(f"<p>{marked}</p>")
    return "".join(out)


def page(title: str, head: str, sections: Sequence[tuple[str, str]]) -> str:
    """The document: `head`, links to the sections, the sections (title, HTML)."""
    links = "".join(f'<a href="#s{i}">{html.escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{html.escape(name)}</h2>{part}</section>' for i, (name, part) in enumerate(sections)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>{head}<nav>{links}</nav>\n{body}</body></html>\n"
    )
