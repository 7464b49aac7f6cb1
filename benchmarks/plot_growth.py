"""What `csp bench --growth --json > growth.json` found, as a picture.

python benchmarks/plot_growth.py growth.json docs/images/growth.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from csp_jax.report.drawing import Scale, round_steps, ticks

WIDTH, HEIGHT, EDGE = 300, 200, 50
MARKS = {"responses": "#2563a8", "tokens": "#c2571a", "vocabulary": "#3f7d4e"}
STYLE = "font: 11px sans-serif; fill: #444"


def main(source: Path, target: Path) -> None:
    rows = json.loads(source.read_text())
    ran = [row for row in rows if row["seconds"] is not None]
    grown = [row for row in rows if row["series"] == "vocabulary"]
    for row in rows:
        row["MiB"] = row["temporary_bytes"] / 2**20
    panels = [
        panel(ran, "behind_the_prompt", "seconds", "tokens behind a prompt", "s an update", fitted=True),
        panel(ran, "behind_the_prompt", "MiB", "tokens behind a prompt", "MiB of temporaries"),
        panel(grown, "vocabulary", "MiB", "words in the vocabulary", "MiB of temporaries"),
    ]
    whole = len(panels) * (WIDTH + EDGE)
    placed = "".join(f'<g transform="translate({n * (WIDTH + EDGE)},0)">{text}</g>' for n, text in enumerate(panels))
    size = f'width="{whole}" height="{HEIGHT + EDGE}" viewBox="0 0 {whole} {HEIGHT + EDGE}"'
    target.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{placed}</svg>\n')


def panel(rows: list[dict[str, Any]], x: str, y: str, below: str, beside: str, *, fitted: bool = False) -> str:
    """Points of every series over axes that begin at zero; the fitted line of time."""
    right, top = (round_steps(0, max(row[name] for row in rows)) for name in (x, y))
    across, up = Scale(0, right[-1], EDGE, WIDTH), Scale(0, top[-1], HEIGHT, 20)
    parts = [f'<path d="M{EDGE},20V{HEIGHT}H{WIDTH}" fill="none" stroke="#888"/>']
    for tick in ticks(across, right):
        parts.append(f'<text x="{tick.at}" y="{HEIGHT + 16}" text-anchor="middle" style="{STYLE}">{tick.text}</text>')
    for tick in ticks(up, top):
        parts.append(f'<text x="{EDGE - 6}" y="{tick.at + 4}" text-anchor="end" style="{STYLE}">{tick.text}</text>')
    middle = (EDGE + WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT + 34}" text-anchor="middle" style="{STYLE}">{below}</text>')
    parts.append(f'<text x="{EDGE}" y="12" style="{STYLE}">{beside}</text>')
    if fitted:
        first, last = (row["fitted_seconds"] for row in (min(rows, key=lambda r: r[x]), max(rows, key=lambda r: r[x])))
        ends = (across(min(row[x] for row in rows)), across(max(row[x] for row in rows)))
        parts.append(f'<path d="M{ends[0]},{up(first)}L{ends[1]},{up(last)}" stroke="#888" stroke-dasharray="4 3"/>')
    for row in rows:
        colour = MARKS[row["series"]]
        parts.append(f'<circle cx="{across(row[x])}" cy="{up(row[y])}" r="3.5" fill="{colour}"/>')
    return "".join(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
