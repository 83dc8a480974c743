"""Which charts a page shows: of one run all that it logged, of several what can be laid over."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from octavo.reporting.series import Event, moving_mean, series
from octavo.reporting.svg import Line, chart

COLOURS = 7  # --c0 ... --c6 of page.css: Okabe and Ito's; further runs have them again, dashed
DASHES = ("", "6 4", "2 4")
RAMP = ((0x2B, 0x7B, 0xBA), (0x8C, 0x8C, 0x8C), (0xDE, 0x82, 0x1E))  # first, middle, last block
NAMED_BLOCKS = 7  # in a legend; the colours of the others lie between theirs
ACCURACIES = (("hellaswag_acc", "acc"), ("hellaswag_acc_norm", "acc_norm"))


def main_lines(events: Sequence[Event]) -> dict[str, list[Line]]:
    """The lines of the three charts that every run has, by their captions."""
    validation = Line(
        *series(events, "eval", "val_loss"), "validation", "var(--accent)", marks=True
    )
    return {
        "Loss (nats a token)": [*_noisy(events, "loss"), validation],
        "Learning rate": [Line(*series(events, "train", "lr"))],
        "Gradient norm (before clipping)": _noisy(events, "grad_norm"),
    }


def run_charts(events: Sequence[Event]) -> list[str]:
    """The charts of one run; what it did not log has none."""
    spikes = [
        (event["step"], f"spike at step {event['step']:,}: {event.get('reason', '')}")
        for event in events
        if event["event"] == "spike"
    ]
    judged = [
        Line(*series(events, "judge", key), name, f"var(--c{i})", marks=True)
        for i, (key, name) in enumerate(ACCURACIES)
    ]
    loss, rate, norm = main_lines(events).items()
    drawn = [
        chart(*loss, log=spiky(loss[1]), spikes=spikes),
        chart(*rate, from_zero=True),
        chart(*norm, log=spiky(norm[1]), spikes=spikes),
        chart("Speed (tokens a second)", _noisy(events, "tokens_per_s"), from_zero=True),
        chart("HellaSwag (share right; 0.25 is chance)", judged),
        chart("Gradient norm by layer", layers(events, "layers"), log=True, spikes=spikes),
        chart("Update by layer (share of the weights' norm)", layers(events, "updates"), log=True),
    ]
    return list(filter(None, drawn))


def comparison_charts(runs: Mapping[str, Sequence[Event]]) -> list[str]:
    """The charts of several runs laid over each other, a colour for each."""

    def lines(
        kind: str, key: str, over: str = "step", unit: float = 1, reach: int | None = None
    ) -> list[Line]:
        """One quantity of each run: the moving mean over steps, or a mark for each judgement."""
        drawn = []
        for i, (name, events) in enumerate(runs.items()):
            (_, x), (_, y) = series(events, kind, over), series(events, kind, key)
            y, known = moving_mean(y, reach) if kind == "train" else y, np.isfinite(x)
            line = Line(x[known] / unit, y[known], name, f"var(--c{i % COLOURS})")
            drawn.append(replace(line, dash=DASHES[i // COLOURS % 3], marks=kind != "train"))
        return drawn

    hours = max((e.get("seconds", 0) for events in runs.values() for e in events), default=0) / 3600
    unit, size = ("hours", 3600) if hours > 3 else ("minutes", 60)
    norms = lines("train", "grad_norm")
    drawn = [
        chart("Validation loss (nats a token)", lines("eval", "val_loss")),
        chart("The same by tokens seen", lines("eval", "val_loss", "tokens"), x_label="tokens"),
        chart("The same by time", lines("eval", "val_loss", "seconds", size), x_label=unit),
        chart("Training loss, smoothed (nats a token)", lines("train", "loss")),
        chart("Gradient norm, smoothed (before clipping)", norms, log=spiky(norms)),
        chart("Learning rate", lines("train", "lr", reach=0), from_zero=True),
        chart("Speed, smoothed (tokens a second)", lines("train", "tokens_per_s"), from_zero=True),
        chart("HellaSwag (acc_norm; 0.25 is chance)", lines("judge", "hellaswag_acc_norm")),
    ]
    return list(filter(None, drawn))


def spiky(lines: Sequence[Line]) -> bool:
    """Whether a few large values of a line would press all others flat on a linear axis."""
    known = [line.y[np.isfinite(line.y)] for line in lines]
    return any(len(y) > 0 and y.min() > 0 and y.max() > 10 * np.median(y) for y in known)


def layers(events: Sequence[Event], key: str) -> list[Line]:
    """One line a layer: blocks from blue to orange by depth, and the rest."""
    logged = [event for event in events if event["event"] == "train" and key in event]
    flat = [{"event": key, "step": event["step"], **event[key]} for event in logged]
    names = {name for event in logged for name in event[key]} - {"rest"}
    depths = sorted(int(name.split(".")[1]) for name in names)
    named = {round(i) for i in np.linspace(0, len(depths) - 1, NAMED_BLOCKS)}
    drawn = []
    for i, depth in enumerate(depths):
        label, colour = f"block {depth}" * (i in named), _ramp(i / max(len(depths) - 1, 1))
        drawn.append(Line(*series(flat, key, f"blocks.{depth}"), label, colour, 1.5))
    rest = Line(*series(flat, key, "rest"), "embeddings, head", "currentColor", 1.5, dash="5 3")
    return [*drawn, rest]


def _noisy(events: Sequence[Event], key: str) -> list[Line]:
    """A quantity of the training steps: light as it is, under its moving mean."""
    steps, values = series(events, "train", key)
    if len(values) < 20:
        return [Line(steps, values, "train")]
    return [
        Line(steps, values, "train", "var(--noise)", 1.0, 0.6),
        Line(steps, moving_mean(values), "train, smoothed"),
    ]


def _ramp(share: float) -> str:
    """A colour between the ramp's ends; blue and orange stay apart for every eye."""
    mixed = (round(np.interp(share, (0, 0.5, 1), ends)) for ends in zip(*RAMP, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
