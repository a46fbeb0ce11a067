"""A page: a verdict, sections with tables and plots, and its HTML in one file without scripts or other resources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bridge import __version__
from gpt2_jax.reporting.drawing import draw
from gpt2_jax.reporting.markup import GENERATOR, HTML_START, Cell, Mark, Number, Table, html_text, number, slug
from gpt2_jax.reporting.plots import Plot
from gpt2_jax.reporting.style import STYLE

MOST_ROWS = 2000
"""Maximum number of rows in the table of a plot's values. The JSON report has all of them."""

# The page needs no script and no other file, so a browser must not load any, whatever text a checkpoint contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Section:
    """A part of a page, with a heading."""

    title: str
    mark: Mark | None = None
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report as a page."""

    title: str
    verdict: Mark
    sections: tuple[Section, ...]
    details: tuple[Section, ...] = ()
    """Sections at the end that have no outcome, such as versions."""


def render(page: Page) -> str:
    """Return the HTML of a page. Equal pages give equal text."""
    sections = (*page.sections, *page.details)
    ids = [f"{slug(section.title)}-{k}" for k, section in enumerate(sections, 1)]
    parts = [
        f'{HTML_START}{html_text(__version__)}">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{html_text(page.title)}</title>",
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{html_text(page.title)}</h1>",
        f'<p class="verdict {page.verdict.status}" id="verdict">{page.verdict.text}</p>',
        _contents(page, ids),
        *(part for section, id in zip(sections, ids, strict=True) for part in _section(section, id)),
        f"</main>\n<footer>{GENERATOR} {html_text(__version__)}</footer>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _contents(page: Page, ids: list[str]) -> str:
    items = [
        f'<li><a href="#{id}">{html_text(section.title)}</a>{_mark(section)}</li>'
        for section, id in zip((*page.sections, *page.details), ids, strict=True)
    ]
    return "\n".join(['<nav aria-label="Contents"><ul>', *items, "</ul></nav>"])


def _mark(section: Section) -> str:
    return "" if section.mark is None else f" {section.mark.to_html()}"


def _section(section: Section, id: str) -> Iterator[str]:
    yield f'<section aria-labelledby="{id}">\n<h2 id="{id}">{html_text(section.title)}{_mark(section)}</h2>'
    for text in section.paragraphs:
        yield f'<p class="note">{html_text(text)}</p>'
    for table in section.tables:
        yield table.to_html()
    if section.plots:
        yield '<div class="plots">'
        for k, plot in enumerate(section.plots, 1):
            yield _figure(plot, f"{id}-{k}")
        yield "</div>"
    yield "</section>"


def _figure(plot: Plot, id: str) -> str:
    values = _values(plot).to_html()
    count = sum(len(series.y) for series in plot.series)
    return (
        f"<figure>\n<figcaption>{html_text(plot.title)}</figcaption>\n{draw(plot, id)}\n"
        f"<details><summary>{count:,} values</summary>\n{values}</details>\n</figure>"
    )


def _values(plot: Plot) -> Table:
    """The values of a plot: a column for each series if all have the same x, else a row for each point."""
    first = plot.series[0]
    if all(series.x == first.x for series in plot.series):
        columns = plot.x_label, *(series.name for series in plot.series)
        rows: list[tuple[Cell, ...]] = [
            (_name(x), *(_number(series.y[k]) for series in plot.series)) for k, x in enumerate(first.x)
        ]
    else:
        columns = "series", plot.x_label, plot.y_label
        points = ((series, x, y) for series in plot.series for x, y in zip(series.x, series.y, strict=True))
        rows = [(series.name, _name(x), _number(y)) for series, x, y in points]
    more = f", the first {MOST_ROWS:,} of {len(rows):,} rows" if len(rows) > MOST_ROWS else ""
    return Table(f"{plot.y_label}{more}", columns, tuple(rows[:MOST_ROWS]))


def _number(value: float) -> Number:
    return Number(number(value))


def _name(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}"
