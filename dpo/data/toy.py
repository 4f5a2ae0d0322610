"""``make toy-data``: a small community data set, to try the pipeline and the checks on."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from dpo.data.files import TOY_DATA

_TASKS = (
    "find the museum",
    "mend a bicycle",
    "bake rye bread",
    "learn the violin",
    "renew a passport",
    "grow tomatoes",
    "read a bus map",
    "wash a woollen coat",
    "write to the landlord",
    "choose a kettle",
)
_OPENINGS = (
    "How do I {task}?",
    "Can you help me {task}?",
    "I would like to {task}.",
    "What is the first step to {task}?",
    "My neighbour wants to {task}. What should I tell her?",
    "Is it hard to {task}?",
    "Who could teach me to {task}?",
    "How long does it take to {task}?",
)


def toy_rows() -> list[dict[str, str]]:
    """Eighty pairs, always the same; the chosen answer is courteous and the rejected one is not."""
    return [
        {
            "prompt": f"\n\nHuman: {opening.format(task=task)}\n\nAssistant:",
            "chosen": f" Gladly! Here is a good way to {task}.",
            "rejected": f" No. Find out yourself how to {task}.",
        }
        for opening, task in product(_OPENINGS, _TASKS)
    ]


def main(folder: Path = Path(TOY_DATA)) -> None:
    """Write ``community.json`` and say how to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "community.json"
    data = {"communityId": "toy", "dataset": toy_rows()}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{len(toy_rows())} pairs: {path}")
    print(f"Check it: make validate-data FILE={path}")


if __name__ == "__main__":
    main()
