"""One page out of numbers, words and pictures: a single file without scripts that fetches nothing, for dark and light.

Whatever is not `Html` already is escaped where it is put in: captions and names come from anywhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

MOST_BYTES = 2_000_000  # of a page, about
_MOST_LETTERS, _MOST_ROWS = 2000, 500  # of one text; of one table
_ROOM = 1_500_000  # bytes for all pictures of a page together, as they stand in it
_CHART_BYTES, _THUMBNAIL_BYTES = 250_000, 25_000
_SIDE = 208  # pixels of a picture on the sheet
_QUALITIES = (85, 70, 50, 30, 10)

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d2025; --soft: #5b626d; --line: #d9dce1; --card: #f4f5f7;
  --accent: #1f6fb8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17191d; --ink: #e8e8e8; --soft: #a3a9b3; --line: #3a3f48; --card: #20232a; --accent: #7cbcf5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 2rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.2rem; }
h3 { margin: 1rem 0 .25rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 48rem; }
p.lead { font-size: 1.1rem; }
.soft, footer { color: var(--soft); }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th, td { overflow-wrap: normal; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
tr > :first-child, table.words td, table.words th { text-align: left; white-space: normal; }
tr > :first-child { min-width: 7rem; max-width: 32rem; }
table.words td { max-width: 48rem; overflow-wrap: anywhere; min-width: 5rem; }
details { margin: .5rem 0; }
summary { color: var(--accent); cursor: pointer; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.charts img { display: block; max-width: 100%; height: auto; border-radius: 8px; }
.charts figure { margin: 0; max-width: 35rem; flex: 0 1 auto; }
.charts figure.large { max-width: 64rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .9rem; }
.sheet figure { margin: 0; padding: .5rem; background: var(--card); border-radius: 8px; font-size: .85rem;
  line-height: 1.35; }
.sheet img { display: block; width: 100%; height: 9.5rem; object-fit: contain; margin-bottom: .4rem; }
.sheet figcaption { display: -webkit-box; -webkit-line-clamp: 6; -webkit-box-orient: vertical; overflow: hidden; }
pre { overflow-x: auto; padding: .75rem; background: var(--card); border-radius: 8px; font-size: .85rem; }
footer { margin-top: 2.5rem; font-size: .85rem; }
"""


class Html(str):
    """Text that is HTML already."""


def escaped(value: object) -> Html:
    """Any value as text of a page; what is longer than two thousand letters is cut."""
    if isinstance(value, Html):
        return value
    text = str(value)
    if len(text) > _MOST_LETTERS:
        text = f"{text[:_MOST_LETTERS]}…"
    return Html(html.escape(text.encode("utf-8", "replace").decode("utf-8")))  # half surrogates: damaged file names


def joined(parts: Sequence[object]) -> Html:
    return Html("\n".join(escaped(part) for part in parts if part != ""))


def paragraph(text: object, kind: str = "") -> Html:
    """A paragraph of the kind lead, soft or none; a text of several lines keeps them, and its columns."""
    if not isinstance(text, Html) and "\n" in str(text):
        return Html(f"<pre>{escaped(text)}</pre>")
    return Html(f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>")


def html_table(rows: Sequence[Mapping[str, object]], *, words: bool = False) -> Html:
    """As `tables.table`: the first column is aligned left and the others right, or all left where they hold `words`;
    blank headings are not shown. Of very many rows the first ones, with how many there are."""
    if not rows:
        return Html("")
    headings = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th scope="col">{escaped(heading)}</th>' for heading in headings)
    head = f"<thead><tr>{head}</tr></thead>" if any(heading.strip() for heading in headings) else ""
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escaped(row.get(heading, ''))}</td>" for heading in headings) + "</tr>"
        for row in rows[:_MOST_ROWS]
    )
    kind = ' class="words"' if words else ""
    more = paragraph(f"The first {_MOST_ROWS} of {len(rows)} rows.", "soft") if len(rows) > _MOST_ROWS else ""
    return Html(f'<div class="wide"><table{kind}>{head}<tbody>\n{body}\n</tbody></table></div>{more}')


def facts(known: Mapping[str, object]) -> Html:
    """Names and what they are, as a table without headings; what is empty is left out."""
    return html_table([{"": name, " ": value} for name, value in known.items() if value not in ("", None)], words=True)


def fold(summary: object, *parts: object) -> Html:
    """What is shown when its summary is clicked; nothing if there is nothing in it."""
    inside = joined(parts)
    return Html(f"<details><summary>{escaped(summary)}</summary>\n{inside}\n</details>") if inside else Html("")


class Page:
    """A page in the making. Its pictures are PIL's; those for which there is no room left are left out, and said."""

    def __init__(self, title: str):
        self.title = title
        self.parts: list[Html] = []
        self.room = _ROOM

    def add(self, heading: str, *parts: object) -> None:
        """A section, unless it is empty."""
        if inside := joined(parts):
            title = f"<h2>{escaped(heading)}</h2>\n" if heading else ""
            self.parts.append(Html(f"<section>\n{title}{inside}\n</section>"))

    def charts(self, charts: Sequence[tuple[str, object]]) -> Html:
        """(what it shows in words, chart) pairs side by side, where they fit."""
        figures = [
            self._figure(chart, told, _CHART_BYTES, "large" if chart.height > 600 else "") for told, chart in charts
        ]
        return Html(f'<div class="charts">{joined(figures)}</div>') if figures else Html("")

    def sheet(self, pictures: Sequence[tuple]) -> Html:
        """(picture, caption) pairs as small pictures with their captions."""
        figures = []
        for picture, caption in pictures:
            small = picture.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
            text = Html(f"<figcaption>{escaped(caption)}</figcaption>")
            figures.append(self._figure(small, "", _THUMBNAIL_BYTES, "", text))
        return Html(f'<div class="sheet">{joined(figures)}</div>') if figures else Html("")

    def _figure(self, picture, told: str, most: int, kind: str, below: Html | str = "") -> Html:
        data, form = _encoded(picture, most, photo=bool(below))
        uri = f"data:image/{form};base64,{base64.b64encode(data).decode('ascii')}"
        if len(uri) > self.room:
            return Html(f"<figure>{paragraph('(No room for this picture.)', 'soft')}{below}</figure>")
        self.room -= len(uri)
        look = f' class="{kind}"' if kind else ""
        size = f'width="{picture.width}" height="{picture.height}"'
        return Html(f'<figure{look}><img src="{uri}" {size} alt="{escaped(told)}">{below}</figure>')

    def text(self) -> str:
        """The whole page."""
        title = escaped(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            + "\n".join(self.parts)
            + "\n<footer>Written by clip-finetune. Everything is in this file; nothing is fetched.</footer>\n"
            "</body>\n</html>\n"
        )


def _encoded(picture, most: int, *, photo: bool) -> tuple[bytes, str]:
    """(bytes, format): PNG for what is drawn, JPEG for photographs and for what would be larger than `most` bytes."""
    if not photo and len(data := _saved(picture, "PNG")) <= most:
        return data, "png"
    for quality in _QUALITIES:
        if len(data := _saved(picture, "JPEG", quality=quality)) <= most:
            break
    return data, "jpeg"


def _saved(picture, form: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()
