"""Did RoPE help? What `octavo ablate` found in a finished study, as a record.

    octavo ablate ablation-s0.yaml TEXT data.val_source=OTHER \\
        --vary model.position=learned,rope --seeds 5 --out runs/ablation-s0
    python benchmarks/ablation_s0.py runs/ablation-s0 --record
"""

import argparse
import json
from pathlib import Path
from typing import Any

from record import machine, versions, write

COMMAND = (
    "octavo ablate ablation-s0.yaml TEXT data.val_source=OTHER "
    "--vary model.position=learned,rope --seeds {seeds}"
)


def results(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm's mean loss between its seeds' extremes, and each effect with its interval."""
    rows = [
        {"what": f"{arm['name']}: mean of {len(arm['losses'])} seeds", "value": arm["loss"]}
        | {"unit": found["unit"], "low": min(arm["losses"]), "high": max(arm["losses"])}
        for arm in found["arms"]
    ]
    for effect in found["effects"]:
        low, high = effect["interval"]
        rows.append(
            {"what": f"{effect['value']} is better than {effect['first']} by (95 % interval)"}
            | {"value": effect["gain"], "unit": found["unit"], "low": low, "high": high}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    found = json.loads((args.study / "ablation.json").read_text(encoding="utf-8"))
    asked = json.loads((args.study / "study.json").read_text(encoding="utf-8"))["asked"]
    print(json.dumps(results(found), indent=2))
    if args.record:
        text = next(iter(asked["arms"].values()))["text"]
        record = {"name": "ablation-s0", "machine": machine(), "rounds": len(found["seeds"])}
        record |= {"versions": versions("octavo", "torch"), "text": text}
        record |= {"command": COMMAND.format(seeds=len(found["seeds"]))}
        verdict = {"verdict": [effect["sentence"] for effect in found["effects"]]}
        print(write(record | verdict | {"results": results(found)}).name)


if __name__ == "__main__":
    main()
