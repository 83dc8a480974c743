"""What follows a spike: its report in the run, and the way back to before it.

A run goes back to the newest checkpoint that ``checkpoint.every`` made, and goes on from there with
the rows after the spike: those in between are never learned from. How many were passed over is part
of the state. Checkpoints made for other reasons are not gone back to, so a run that was stopped and
resumed on the way ends as the undisturbed one; and with a kill after going back, the resumed run
meets the same spike again and does the same.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from octavo import disk
from octavo.checkpoint import Run
from octavo.manifest import to_json, valid_checkpoints
from octavo.training.display import Display
from octavo.training.learner import Learner, restore
from octavo.training.spike import MOST_REWINDS, Spike, jumps_of, shown

FOLDER = "spikes"
SHOWN_STEPS = 20  # of the ring, in the report for people; the JSON has all of them


def rewind(learner: Learner, run: Run, display: Display, spike: Spike) -> bool:
    """Go back to the last regular checkpoint, to go on with the row after the step that spiked.

    False, and nothing is changed, where there is no such checkpoint.
    """
    config, progress = learner.task.config, learner.progress
    before = dataclasses.replace(progress)
    every, rows = config.checkpoint.every, config.train.batch_size
    saved = learner.ranks.first(lambda: valid_checkpoints(run.folder)) if every else []
    regular = [path for path, manifest in saved if manifest.step % every == 0]
    if not regular:
        display.say(f"step {before.step:,} is left out: there is no checkpoint to go back to yet")
        return False
    learner.optimizer.state.clear()  # the first weights of an imported run have none
    restore(learner, Run.open(regular[-1]), Display(quiet=True))
    vars(progress).update(vars(learner.progress))
    learner.progress = progress  # the loop holds it
    progress.skipped_rows = (before.step - progress.step) * rows + before.skipped_rows
    progress.rewinds, progress.rewound_from = spike.rewinds, before.step
    progress.best_step, progress.best_val_loss = before.best_step, before.best_val_loss
    last = spike.rewinds == MOST_REWINDS
    more = "; if that does not help, spikes are only logged" if last else ""
    back = f"rewound from step {before.step:,} to {progress.step:,}"
    display.say(f"{back}, to go on with other rows{more}")
    return True


def write_spike(run: Path, spike: Spike) -> str:
    """Write a spike's report as JSON and as text; returns the text's path within the run.

    Raises `ResourceError` when the disk refuses.
    """
    folder = run / FOLDER
    with disk.errors(f"write {folder}"):
        folder.mkdir(exist_ok=True)
    disk.write_atomic(folder / f"{spike.name}.json", to_json(spike.report))
    text = _as_text(spike).encode("utf-8", errors="replace")
    disk.write_atomic(folder / f"{spike.name}.txt", text)
    return f"{FOLDER}/{spike.name}.txt"


def _as_text(spike: Spike) -> str:
    report, reading = spike.report, spike.report["recent"][-1]
    lines = [f"step {report['step']:,}: {report['what']}"]
    lines += [f"began in {report['began']}"] if report["began"] else []
    lines += [f"learning rate {reading['lr']:.4g}, loss scale {_number(reading['scale'])}", ""]
    lines += _rows(report)
    jumps = jumps_of(report["recent"][:-1], reading)
    lines += ["", "gradient norm by layer, and as a multiple of its median before"]
    lines += [
        f"  {shown(name):<16} {_number(norm):>10} {_number(jumps.get(name)):>10}"
        for name, norm in reading["layers"].items()
    ]
    lines += ["", "largest activation that left each layer, without dropout"]
    lines += [f"  {name:<16} {_number(peak):>10}" for name, peak in report["activations"].items()]
    lines += ["", f"  {'step':>8} {'first row':>10} {'loss':>10} {'norm':>10} {'rate':>10}"]
    lines += [
        f"  {r['step']:>8} {r['row']:>10} {_number(r['loss']):>10} {_number(r['grad_norm']):>10} "
        f"{_number(r['lr']):>10}"
        for r in report["recent"][-SHOWN_STEPS:]
    ]
    return "\n".join(lines) + "\n"


def _rows(report: dict[str, Any]) -> list[str]:
    if "unknown" in report:
        return [f"its rows could not be looked at: {report['unknown']}"]
    first, count = report["first_row"], len(report["losses"])
    out = report["standing_out"]
    lines = [f"its rows are {first:,} to {first + count - 1:,}; {len(out) or 'none'} stand out"]
    for row in report["worst"]:
        mark = ", stands out" if row["stands_out"] else ""
        lines += ["", f"row {row['row']:,}: loss {_number(row['loss'])}, {row['where']}{mark}"]
        hard = [
            f"{json.dumps(h['target'], ensure_ascii=False)} at {h['position']} "
            f"({_number(h['nats'])} nats)"
            for h in row["hardest"]
        ]
        lines += [f"hardest: {', '.join(hard)}", "-" * 72, row["text"], "-" * 72]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
