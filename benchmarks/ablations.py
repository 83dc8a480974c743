"""What finished studies of `octavo ablate` found, as one record: each setting's effect.

    octavo ablate ablation-s0.yaml TEXT data.val_source=OTHER \\
        --vary model.position=learned,rope --seeds 5 --out runs/ablation-s0
    python benchmarks/ablations.py ablation-s0 runs/ablation-s0 --record
    octavo ablate modern-char.yaml TEXT --vary model.qk_norm=true,false --out runs/modern/qk_norm
    python benchmarks/ablations.py ablation-modern runs/modern/* --record
"""

import argparse
import json
from pathlib import Path
from typing import Any

from record import machine, versions, write

COMMANDS = {
    "ablation-s0": "octavo ablate ablation-s0.yaml TEXT data.val_source=OTHER "
    "--vary model.position=learned,rope --seeds {seeds}",
    "ablation-modern": "octavo ablate modern-char.yaml TEXT --vary SETTING=FIRST,OTHER "
    "--seeds {seeds}",
}


def read(study: Path, name: str) -> dict[str, Any]:
    """A file of a study."""
    return json.loads((study / name).read_text(encoding="utf-8"))


def arms(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm's mean loss between its seeds' extremes."""
    return [
        {"what": f"{arm['name']}: mean of {len(arm['losses'])} seeds", "value": arm["loss"]}
        | {"unit": found["unit"], "low": min(arm["losses"]), "high": max(arm["losses"])}
        for arm in found["arms"]
    ]


def effects(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each effect with its interval."""
    return [
        {"what": f"{e['setting']}: {e['value']} is better than {e['first']} by (95 % interval)"}
        | {"value": e["gain"], "unit": found["unit"]}
        | dict(zip(("low", "high"), e["interval"], strict=True))
        for e in found["effects"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    studies = [read(study, "ablation.json") for study in args.studies]
    results = []
    for path, found in zip(args.studies, studies, strict=True):
        about = f"{path.name}, " if len(studies) > 1 else ""
        rows = arms(found) + effects(found)
        results += [row | {"what": about + row["what"]} for row in rows]
    print(json.dumps(results, indent=2))
    if args.record:
        asked, seeds = read(args.studies[0], "study.json")["asked"], len(studies[0]["seeds"])
        text = next(iter(asked["arms"].values()))["text"]
        record = {"name": args.name, "machine": machine(), "rounds": seeds}
        record |= {"versions": versions("octavo", "torch"), "text": text}
        record |= {"command": COMMANDS[args.name].format(seeds=seeds)}
        record |= {"verdict": [e["sentence"] for found in studies for e in found["effects"]]}
        print(write(record | {"results": results}).name)


if __name__ == "__main__":
    main()
