"""Which charts a page shows: of one run all that it logged, of several what can be laid over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from octavo.reporting.curves import Event, moving_mean, series, spiky
from octavo.reporting.svg import Line, Mark, chart

COLOURS = 7  # --c0 ... --c6 of page.css: Okabe and Ito's; further runs have them again, dashed
DASHES = ("", "6 4", "2 4")
RAMP = ((0x2B, 0x7B, 0xBA), (0x8C, 0x8C, 0x8C), (0xDE, 0x82, 0x1E))  # first, middle, last block
NAMED_BLOCKS = 7  # in a legend; the colours of the others lie between theirs
ACCURACIES = (("hellaswag_acc", "acc"), ("hellaswag_acc_norm", "acc_norm"))


def run_charts(events: Sequence[Event]) -> list[str]:
    """The charts of one run; what it did not log has none."""
    marks = [
        Mark(event["step"], "spike", f"spike at step {event['step']:,}: {event.get('reason', '')}")
        for event in events
        if event["event"] == "spike"
    ]
    _, losses = series(events, "train", "loss")
    _, norms = series(events, "train", "grad_norm")
    judged = [
        Line(*series(events, "judge", key), name, f"var(--c{i})", marks=True)
        for i, (key, name) in enumerate(ACCURACIES)
    ]
    drawn = [
        chart(
            "Loss (nats a token)",
            [*_noisy(events, "loss"), validation(events, "validation", "var(--accent)")],
            log=spiky(losses),
            marks=marks,
        ),
        chart("Learning rate", [Line(*series(events, "train", "lr"))], from_zero=True),
        chart(
            "Gradient norm (before clipping)",
            _noisy(events, "grad_norm"),
            log=spiky(norms),
            marks=marks,
        ),
        chart("Speed (tokens a second)", _noisy(events, "tokens_per_s"), from_zero=True),
        chart("HellaSwag (share right; 0.25 is chance)", judged),
        chart("Gradient norm by layer", layers(events, "layers"), log=True, marks=marks),
        chart("Update by layer (share of the weights' norm)", layers(events, "updates"), log=True),
    ]
    return list(filter(None, drawn))


def comparison_charts(runs: Mapping[str, Sequence[Event]]) -> list[str]:
    """The charts of several runs laid over each other, a colour for each."""

    def lines(draw: Callable[[Sequence[Event], str, str], Line]) -> list[Line]:
        return [
            replace(draw(events, name, f"var(--c{i % COLOURS})"), dash=DASHES[i // COLOURS % 3])
            for i, (name, events) in enumerate(runs.items())
        ]

    hours = max((e.get("seconds", 0) for events in runs.values() for e in events), default=0) / 3600
    unit, size = ("hours", 3600) if hours > 3 else ("minutes", 60)
    norms = lines(smooth("grad_norm"))
    drawn = [
        chart("Validation loss (nats a token)", lines(validation)),
        chart("The same by tokens seen", lines(validation_by("tokens", 1)), x_label="tokens"),
        chart("The same by time", lines(validation_by("seconds", size)), x_label=unit),
        chart("Training loss, smoothed (nats a token)", lines(smooth("loss"))),
        chart(
            "Gradient norm, smoothed (before clipping)",
            norms,
            log=any(spiky(line.y) for line in norms),
        ),
        chart("Learning rate", lines(smooth("lr", 0)), from_zero=True),
        chart("Speed, smoothed (tokens a second)", lines(smooth("tokens_per_s")), from_zero=True),
        chart("HellaSwag (acc_norm; 0.25 is chance)", lines(hellaswag)),
    ]
    return list(filter(None, drawn))


def validation(events: Sequence[Event], label: str, colour: str) -> Line:
    """The validation losses, each with a mark."""
    return Line(*series(events, "eval", "val_loss"), label, colour, marks=True)


def validation_by(axis: str, size: float) -> Callable[[Sequence[Event], str, str], Line]:
    """The validation losses over another quantity of the events, in units of ``size``."""

    def draw(events: Sequence[Event], label: str, colour: str) -> Line:
        _, losses = series(events, "eval", "val_loss")
        _, across = series(events, "eval", axis)
        known = np.isfinite(across)
        return Line(across[known] / size, losses[known], label, colour, marks=True)

    return draw


def smooth(key: str, reach: int | None = None) -> Callable[[Sequence[Event], str, str], Line]:
    """The moving mean of a quantity of the training steps."""

    def draw(events: Sequence[Event], label: str, colour: str) -> Line:
        steps, values = series(events, "train", key)
        wide = max(len(values) // 50, 2) if reach is None else reach
        return Line(steps, moving_mean(values, wide), label, colour)

    return draw


def hellaswag(events: Sequence[Event], label: str, colour: str) -> Line:
    """The share of HellaSwag's items that were right, by length-normalized likelihood."""
    return Line(*series(events, "judge", "hellaswag_acc_norm"), label, colour, marks=True)


def layers(events: Sequence[Event], key: str) -> list[Line]:
    """One line a layer: blocks from blue to orange by depth, and the rest."""
    logged = [event for event in events if event["event"] == "train" and key in event]
    names = list(dict.fromkeys(name for event in logged for name in event[key]))
    blocks = sorted((n for n in names if n != "rest"), key=lambda name: int(name.split(".")[1]))
    order = blocks + ["rest"] * ("rest" in names)
    flat = [{"event": key, "step": event["step"], **event[key]} for event in logged]
    named = {round(i) for i in np.linspace(0, len(blocks) - 1, NAMED_BLOCKS)}
    drawn = []
    for i, name in enumerate(order):
        block = name != "rest"
        colour = _ramp(i / max(len(blocks) - 1, 1)) if block else "currentColor"
        label = f"block {name.split('.')[1]}" * (i in named) if block else "embeddings, head"
        drawn.append(
            Line(*series(flat, key, name), label, colour, 1.5, dash="" if block else "5 3")
        )
    return drawn


def _noisy(events: Sequence[Event], key: str) -> list[Line]:
    """A quantity of the training steps: light as it is, under its moving mean."""
    steps, values = series(events, "train", key)
    if len(values) < 20:
        return [Line(steps, values, "train")]
    return [
        Line(steps, values, "train", "var(--noise)", 1.0, 0.6),
        smooth(key)(events, "train, smoothed", "var(--line)"),
    ]


def _ramp(share: float) -> str:
    """A colour between the ramp's ends; blue and orange stay apart for every eye."""
    low, high = RAMP[:2] if share < 0.5 else RAMP[1:]
    part = share * 2 % 1 if share < 1 else 1.0
    mixed = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
