"""The page: plain HTML with its style and pictures inside, so that it opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
svg, img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.15rem 0.7rem; text-align: left; }
th { border-bottom: 1px solid #999; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { background: #f4f4f2; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem;
      white-space: pre-wrap; }
.prompt { color: #777; }
.note { color: #555; font-size: 0.9rem; }
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of (heading, HTML) sections."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def paragraph(text: str) -> str:
    """A note under a picture."""
    return f'<p class="note">{escape(text)}</p>'


def facts(values: Mapping[str, str]) -> str:
    """A two-column table."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A table whose columns from `numbers_from` on are aligned right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column >= numbers_from else ''}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>\n{lines}</table>"


def sample(prompt: str, text: str) -> str:
    """Prompt in grey, continuation in black."""
    return f'<pre><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre>'
