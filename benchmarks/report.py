"""Turns pytest-benchmark's JSON into CSV, Markdown and one self-contained HTML page.

Usage: ``python -m benchmarks.report bench-out/*.json --output FOLDER``; without a folder,
``benchmarks/results/<device class>/``.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
from pathlib import Path

from .plots import PLOTS, draw
from .results import Results, joined, read, read_written, write_csv, write_json
from .tables import Table, everything

RESULTS = Path(__file__).parent / "results"

METHOD = """\
Every arm's output and gradients are compared with float64 first; an arm whose error is above the limit of its dtype is
void and gets no times. Then all arms of a comparison take turns in one process: one sample of each in every round, in
a random order, garbage collection off. A ratio is taken between samples of the same round, and its median over the
rounds is reported (N rounds); quick calls are repeated within a sample. The backends that really ran are recorded in
the CSV, so no row silently fell back to another one. On a GPU the times are those between two events, with the device
kept busy until the step is enqueued (wall times stand beside them), every sample follows a write of 256 MiB, and the
frozen layer is its bare products."""

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:1260px;margin:2rem auto;padding:0 1rem;color:#202124;background:#fff}
h1{font-size:1.6rem} h2{font-size:1.15rem;margin-top:2.2rem} p.note{color:#5f6368;max-width:75ch}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .5rem;border-bottom:1px solid #e3e5e8;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{border-bottom:2px solid #8a8f98;vertical-align:bottom;white-space:normal}
td:first-child{white-space:normal;min-width:11rem}
td:last-child{white-space:normal;max-width:16rem}
table.reasons td,table.reasons th{text-align:left;white-space:normal;max-width:none}
b{color:#c8102e} img{max-width:100%;background:#fff}
@media (prefers-color-scheme:dark){body{background:#16181b;color:#e3e5e8}p.note{color:#9aa0a6}
th,td{border-color:#33373d}}
"""


def summary(results: Results) -> list[str]:
    """Say what ran where, in a few lines."""
    info = results.info
    found: dict[str, dict[str, None]] = {}
    for comparison in results.comparisons:
        for name, version in comparison.info["versions"].items():
            found.setdefault(name, {})[version] = None
    versions = ", ".join(f"{name} {' or '.join(each)}" for name, each in found.items())
    dates = sorted({c.info["date"] for c in results.comparisons})
    loads = [c.info[key] for c in results.comparisons for key in ("load_before", "load_after") if key in c.info]
    threads = sorted({c.info["threads"] for c in results.comparisons if c.info["suite"] != "overhead"})
    lines = [
        f"Device class {info['device_class']}: {info['processor']}, {info['cores']} cores, "
        f"{' or '.join(map(str, threads)) or 1} threads.",
        f"Versions: {versions}.",
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; load of the machine {min(loads):.1f} to "
        f"{max(loads):.1f} (this benchmark itself is a load of about {max(threads, default=1)}).",
    ]
    if max(loads) > 1.5 * max(threads, default=1):
        lines.append("**Other programs ran at the same time: medians are disturbed, quartiles show how much.**")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown(results: Results, plots: list[tuple[str, str]]) -> str:
    """Return the report in Markdown; plots are linked by file name."""
    parts = [f"# peftk benchmarks on {results.info['device_class']}", *summary(results), METHOD]
    parts += [f"![{title}]({name}.png)" for name, title in plots]
    for table in everything(results):
        lines = [f"| {' | '.join(map(_cell, row))} |" for row in (table.header, *table.rows)]
        lines.insert(1, "|" + "---|" * len(table.header))
        parts += [f"## {table.title}", table.note, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def inline(text: str) -> str:
    """Return a text in HTML, with its bold words."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))


def table_html(table: Table) -> str:
    """Return a table in HTML."""
    kind = ' class="reasons"' if table.header[-1] in ("reason", "remark") else ""
    head = "".join(f"<th>{inline(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<h2>{inline(table.title)}</h2><p class="note">{inline(table.note)}</p>'
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def page(results: Results, plots: list[tuple[str, str, bytes]]) -> str:
    """Return the report as one HTML page that needs no other file."""
    title = f"peftk benchmarks on {results.info['device_class']}"
    images = "".join(
        f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'
        for _, name, data in plots
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{html.escape(title)}</h1>'
        + "".join(f"<p>{inline(line)}</p>" for line in summary(results))
        + f'<p class="note">{inline(METHOD)}</p>{images}'
        + "".join(table_html(table) for table in everything(results))
        + "</html>\n"
    )


def write(results: Results, folder: Path) -> list[Path]:
    """Write results.json, results.csv, report.md with its plots, and report.html into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = list(draw(results))
    # A plot of an earlier run that this one has no data for would pass for this one's.
    for name in PLOTS:
        (folder / f"{name}.png").unlink(missing_ok=True)
    write_json(folder / "results.json", results)
    write_csv(folder / "results.csv", results.comparisons)
    for name, _, data in plots:
        (folder / f"{name}.png").write_bytes(data)
    (folder / "report.md").write_text(markdown(results, [(name, title) for name, title, _ in plots]))
    (folder / "report.html").write_text(page(results, plots))
    names = ("results.json", "results.csv", *(f"{name}.png" for name, _, _ in plots), "report.md", "report.html")
    return [folder / name for name in names]


def update(results: Results, folder: Path) -> list[Path]:
    """Write the report with these comparisons in place of older ones; what only an earlier run measured stays."""
    earlier = folder / "results.json"
    return write(joined(read_written(earlier), results) if earlier.is_file() else results, folder)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", type=Path, help="files of pytest-benchmark; later ones win")
    parser.add_argument("--output", type=Path, help="folder; default benchmarks/results/<device class>")
    options = parser.parse_args(arguments)
    results = read(options.json)
    written = write(results, options.output or RESULTS / results.info["device_class"])
    print("report:", *(str(path) for path in written if path.suffix in (".md", ".html")))


if __name__ == "__main__":
    main()
