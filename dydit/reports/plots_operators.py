"""The picture of where the time of a step goes, by operator."""

from __future__ import annotations

from collections.abc import Mapping

from dydit.plot_style import ACCENT, ACCENT_LIGHT, MUTED, drawing, headline, png


def operators_png(sides: Mapping[str, Mapping[str, float]], detail: str) -> bytes:
    """Milliseconds of a step by group of operators, a bar for each side; the groups of the last side in their order.

    `sides`: by name, milliseconds by group.
    """
    *_, last = sides.values()
    names = sorted({name for side in sides.values() for name in side}, key=lambda name: -last.get(name, 0.0))
    with drawing(7.2, 1.4 + 0.42 * len(names)) as figure:
        total = sum(last.values())
        share = last.get(names[0], 0.0) / total
        headline(figure, f"{names[0].capitalize()} take {share:.0%} of a {list(sides)[-1]} step", detail)
        axis = figure.add_subplot()
        height = 0.8 / len(sides)
        for number, ((side, groups), colour) in enumerate(zip(sides.items(), (ACCENT_LIGHT, ACCENT), strict=True)):
            values = [groups.get(name, 0.0) for name in names]
            places = [row + (number - (len(sides) - 1) / 2) * height for row in range(len(names))]
            axis.barh(places, values, height * 0.92, color=colour, label=side)
            for place, value in zip(places, values, strict=True):
                text = f"{value:.1f} ms, {value / sum(groups.values()):.1%}"
                axis.annotate(
                    text, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5, color=MUTED
                )
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds of a step")
        axis.set_xlim(0, 1.22 * max(max(groups.values()) for groups in sides.values()))
        axis.legend(loc="lower right")
        return png(figure)
