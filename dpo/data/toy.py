"""``make toy-data``: a small community data set, to try the pipeline and the checks on."""

from __future__ import annotations

import json
from pathlib import Path

from dpo.data.files import TOY_DATA

_PLANTS = {
    "basil": ("a sunny windowsill", "every two days", "pinch off the flowers"),
    "lavender": ("a dry, sunny bed", "once a week", "cut it back by a third after it has bloomed"),
    "a fern": ("a shady corner", "as soon as the soil feels dry", "remove brown fronds"),
    "a cactus": ("the brightest window", "every three weeks", "leave it alone in winter"),
    "mint": ("a pot of its own", "every day in summer", "harvest it often"),
    "a tomato": ("the warmest wall", "every morning at the root", "take out the side shoots"),
    "a rose": ("an airy, sunny bed", "twice a week, deeply", "prune it above an outward bud"),
    "an orchid": ("an east window", "once a week, then drain it", "cut old stems at a node"),
}
_QUESTIONS = (
    ("Where should {plant} stand?", "Put {plant} in {place}."),
    ("How often do I water {plant}?", "Water {plant} {water}."),
    ("How do I keep {plant} in shape?", "To keep {plant} in shape, {care}."),
    ("My neighbour gave me {plant}. What now?", "Find {place} for {plant} and water it {water}."),
)
_POOR = ("Look it up somewhere.", "That does not matter much.", "Plants are all the same.")


def toy_rows() -> list[dict[str, str]]:
    """Pairs on plants, always the same: a helpful answer and one of no use."""
    rows: list[dict[str, str]] = []
    for plant, (place, water, care) in _PLANTS.items():
        for question, answer in _QUESTIONS:
            values = {"plant": plant, "place": place, "water": water, "care": care}
            rows.append(
                {
                    "prompt": question.format(**values),
                    "chosen": answer.format(**values),
                    "rejected": _POOR[len(rows) % len(_POOR)],
                }
            )
    return rows


def main(folder: Path = Path(TOY_DATA)) -> None:
    """Write ``community.json`` and say how to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "community.json"
    data = {"communityId": "toy-garden", "dataset": toy_rows()}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{len(toy_rows())} pairs: {path}")
    print(f"Check it: make validate-data FILE={path}")


if __name__ == "__main__":
    main()
