"""Draws docs/hardness.svg, the picture in the README, from the tables of docs/batching.md.

    python benchmarks/hardness_picture.py

One arrow for each data set, batches of 64 pairs: from the paper's procedure to the whole method of this project.
"""

from __future__ import annotations

import math
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
BATCH_SIZE = 64
METHODS = {"shipped": "the paper's procedure", "**ours whole:**": "hardbatch"}

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 70, 700, 52, 276
SECONDS = (0.3, 150.0)
HARDNESS = (0.5, 0.82)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#7b3294")


def read_figures(text: str) -> dict[str, list[tuple[float, float]]]:
    """For each data set its (seconds, masked share), in the order of METHODS."""
    figures = {}
    for section in text.split("<!-- figures -->")[1].split("<!-- end of figures -->")[0].split("\n\n"):
        first_line = section.split("\n")[0]
        if ", B = " in first_line:
            title, _, size = first_line.partition(", B = ")
        elif first_line.startswith("| method") and int(size) == BATCH_SIZE:
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n")[2:]]
            figures[title.split(",")[0]] = [
                next((float(row[1]), float(row[3])) for row in rows if row[0].startswith(method)) for method in METHODS
            ]
    return figures


def x_of(seconds: float) -> float:
    """Horizontal place on a logarithmic scale, in pixels."""
    low, high = map(math.log, SECONDS)
    return LEFT + (RIGHT - LEFT) * (math.log(seconds) - low) / (high - low)


def y_of(hardness: float) -> float:
    """Vertical place, in pixels."""
    low, high = HARDNESS
    return BOTTOM - (BOTTOM - TOP) * (hardness - low) / (high - low)


def draw(figures: dict[str, list[tuple[float, float]]]) -> str:
    """The picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        '<text x="70" y="22" font-size="15" font-weight="bold">Harder batches in less time</text>',
        '<circle cx="452" cy="17" r="5.5" fill="#fff" stroke="#555" stroke-width="2"/>',
        '<text x="463" y="22">the paper\'s procedure</text>',
        '<circle cx="617" cy="17" r="6" fill="#555"/><text x="628" y="22">hardbatch</text>',
    ]

    for seconds in (0.3, 1, 3, 10, 30, 100):
        x = x_of(seconds)
        parts.append(f'<path d="M{x:.1f} {TOP}V{BOTTOM}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 19}" text-anchor="middle">{seconds:g} s</text>')
    for hardness in (0.5, 0.6, 0.7, 0.8):
        y = y_of(hardness)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{hardness:.1f}</text>')
    middle = (TOP + BOTTOM) / 2
    parts.append(
        f'<text transform="translate(22 {middle:.0f}) rotate(-90)" text-anchor="middle">hardness (random = 0)</text>'
    )
    parts.append(
        f'<text x="{(LEFT + RIGHT) / 2:.0f}" y="{BOTTOM + 42}" text-anchor="middle">'
        "seconds to cut the corpus into batches of 64 (logarithmic)</text>"
    )

    for colour, (name, ((slow, easy), (fast, hard))) in zip(COLOURS, figures.items(), strict=True):
        x1, y1, x2, y2 = x_of(slow), y_of(easy), x_of(fast), y_of(hard)
        parts += [
            f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="2" stroke-opacity=".5"/>',
            f'<circle cx="{x1:.1f}" cy="{y1:.1f}" r="5.5" fill="#fff" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{x2:.1f}" cy="{y2:.1f}" r="6" fill="{colour}"/>',
            f'<text x="{x1:.1f}" y="{y1 + 22:.1f}" fill="{colour}" text-anchor="middle">{name}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (DOCS / "hardness.svg").write_text(draw(read_figures((DOCS / "batching.md").read_text())))
