import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import Config, ModelConfig, OptimConfig, TrainConfig
from octavo.reporting.page import flat, render
from octavo.reporting.report import write_report

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), and the text in them; refuses bad nesting."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def start(**sections: object) -> dict:
    model = ModelConfig(vocab_size=65, n_layer=4, n_head=4, d_model=128)
    config = dataclasses.replace(Config(model=model), **sections)
    return {
        "event": "start",
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "settings": json.loads(json.dumps(dataclasses.asdict(config))),
        "environment": {"python": "3.11.2", "torch": "2.13.0", "device": "cpu", "threads": 2},
        "parameters": 802_688,
        "data": {"name": "shakespeare", "sha256": "86c4e6aa", "tokens": 1_003_854},
    }


def run(last: int = 1000, end: str = "finished") -> list[dict]:
    """A run of which every figure on the page can be told beforehand."""
    events = [start()]
    for step in range(10, last + 1, 10):
        at = {"step": step, "tokens": 2048 * step, "seconds": step / 4}
        train = {"loss": 4.0 - step / 500, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 8192.0}
        events.append({"event": "train", **at, **train})
        if step % 250 == 0:
            loss = 2.0 + abs(step - 500) / 1000  # best at 500
            ppl, bpb = math.exp(loss), loss / math.log(2)
            events.append({"event": "eval", **at, "val_loss": loss, "val_ppl": ppl, "val_bpb": bpb})
            events.append({"event": "sample", **at, "prompt": "To be", "text": f" or {step}"})
    if end:
        events.append({**events[-1], "event": "end", "reason": end})
    return events


def headline(page: Page) -> dict[str, str]:
    """The figures at the top."""
    return dict(zip(page.text["dt"], page.text["dd"], strict=True))


def test_the_headline_says_what_the_metrics_say():
    html = render(run(), "mine")
    assert (
        html.count('<tr class="best">') == html.count('<tr class="best"><th scope="row">500<') == 1
    )
    page = Page(html)
    assert headline(page) == {
        "Validation loss": "2.000",
        "Perplexity": "7.39",
        "Bits a byte": "2.885",
        "Steps": "1,000",
        "Time": "4 min 10 s",
        "Speed": "8,192",
    }
    assert page.text["h1"] == ["mine"]
    assert page.text["small"][1:5] == ["at step 500", "at step 500", "of 2,000", "2.05 M tokens"]
    assert "802,688 parameters (4 layers of width 128, 4 heads" in page.text["p"][0]


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("finished", "Finished after 1,000 steps."),
        ("early stop", "Stopped early at step 1,000"),
        ("stopped", "Not finished: step 1,000 of 2,000."),
        ("", "Not finished: step 1,000 of 2,000."),
    ],
)
def test_the_page_says_how_the_run_ended(reason: str, says: str):
    assert says in Page(render(run(end=reason), "mine")).text["p"][0]


def test_the_page_says_what_befell_the_run():
    events = run(end="")
    again = start() | {"step": 500, "resumed_from": 500}
    skips = [{"event": "skip", "step": step, "reason": "loss nan"} for step in range(601, 610)]
    notes = Page(render([*events, again, *skips], "mine")).text["li"]
    assert notes[:2] == [
        "Interrupted and resumed from step 500.",
        "Skipped, for numbers were not finite: step 601, 602, 603, 604, 605 and 4 more (loss nan).",
    ]


def test_the_page_of_a_run_that_goes_on_loads_itself_again():
    refresh = ("meta", {"http-equiv": "refresh", "content": "20"})
    alive, over = (Page(render(run(end=""), "mine", alive)) for alive in (True, False))
    assert refresh in alive.elements
    assert "Training goes on. This page loads itself again every 20 seconds." in alive.text["li"]
    assert refresh not in over.elements


def test_spikes_are_told_with_their_text_and_marked_in_the_curves():
    told = {"reason": "loss 9.3 is 14 σ above its median 2.1", "began": "blocks.3: it jumped"}
    told |= {"row": 4711, "where": "tokens 5 to 21", "text": "<zqxj>", "report": "spikes/a.txt"}
    spike = {"event": "spike", "step": 500, **told}
    back = {"event": "rewind", "step": 490, "spiked_at": 500, "skipped_rows": 320}
    page = Page(render([*run(), spike, back], "mine"))
    assert "<zqxj>" in page.text["pre"]
    assert "Went back from a spike at step 500 to step 490, on to other rows." in page.text["li"]
    said = " ".join(page.text["p"])
    for part in ("blocks.3: it jumped", "row is 4,711: tokens 5 to 21", "spikes/a.txt"):
        assert part in said
    marks = [title for title in page.text["title"] if title.startswith("spike at step 500: loss")]
    assert len(marks) == 2, "in the curves of loss and gradient norm"


def test_mfu_and_memory_have_a_place_where_they_are_known():
    events = run()
    for event in events:
        if event["event"] == "train":
            event |= {"mfu": 0.4, "memory_bytes": event["step"] * 10**6}
    figures = headline(Page(render(events, "mine")))
    assert (figures["MFU"], figures["Memory"]) == ("40%", "1.00 GB")


def test_every_sample_stands_on_the_page_and_the_newest_lies_open():
    page = Page(render(run(), "mine"))
    opened = [attrs for tag, attrs in page.elements if tag == "details" and "class" in attrs]
    assert ["open" in attrs for attrs in opened] == [False, False, False, True]
    assert page.text["pre"] == [" or 250", " or 500", " or 750", " or 1000"]
    assert page.text["b"] == ["To be"] * 4


def test_settings_that_differ_come_first_and_what_follows_from_them_is_no_difference():
    """d_ff, head_dim and n_kv_head differ from their defaults only because d_model does."""
    told = start(optim=OptimConfig(lr=3e-4), train=TrainConfig(max_steps=50))
    html = render([told], "mine")
    table = html[html.index("Settings that differ") : html.index("All ")]
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', table)
    assert rows == [
        ("model.vocab_size", "65", "0"),
        ("model.n_layer", "4", "6"),
        ("model.n_head", "4", "6"),
        ("model.d_model", "128", "384"),
        ("optim.lr", "0.0003", "0.001"),
        ("train.max_steps", "50", "2000"),
    ]
    for key in flat(told["settings"]):
        assert f'<th scope="row">{key}</th>' in html


def test_settings_of_another_version_are_shown_all_the_same():
    told = start()
    told["settings"]["model"] |= {"n_head": 5, "head_dim": 24}  # no d_model / n_head: given
    told["settings"]["future"] = {"<new>": [1, None, "x"]}
    html = render([told], "mine")
    assert "future.&lt;new&gt;</th><td>[1, null, &quot;x&quot;]</td><td>–" in html


HOSTILE = "</pre></details><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'"


def test_what_a_model_writes_cannot_become_markup():
    """A model trained on HTML writes HTML; so may a file's name."""
    events = run(250)
    events[0]["data"]["name"] = events[0]["environment"]["command"] = HOSTILE
    events[0]["settings"]["data"]["source"] = HOSTILE
    events.append({"event": "sample", "step": 250, "prompt": HOSTILE, "text": HOSTILE})
    events.append({"event": "skip", "step": 251, "reason": HOSTILE})
    page = Page(render(events, HOSTILE))
    assert not {"script", "img"} & set(page.tags())
    assert HOSTILE in page.text["pre"]
    assert HOSTILE in page.text["b"]
    assert page.text["h1"] == [HOSTILE]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_any_sample_is_the_text_of_the_page_and_nothing_else(prompt: str, text: str):
    sample = {"event": "sample", "step": 1, "prompt": prompt, "text": text}
    page = Page(render([sample], "mine"))
    assert "".join(page.text.get("pre", [])) == text
    assert "".join(page.text.get("b", [])) == prompt


def test_half_a_surrogate_pair_in_a_sample_can_be_written(tmp_path: Path):
    line = '{"event": "sample", "step": 1, "prompt": "", "text": "a\\ud800b"}\n'
    (tmp_path / "metrics.jsonl").write_text(line, encoding="utf-8")
    assert "a?b" in write_report(tmp_path).read_text(encoding="utf-8")


def test_the_page_is_one_file_that_opens_without_network_or_script():
    page = Page(render(run(), "mine"))
    loads = {"src", "href", "action", "data", "poster", "srcset", "background"}
    named = [value for _, attrs in page.elements for name, value in attrs.items() if name in loads]
    assert named == []
    assert "svg" in page.tags()
    assert not {"script", "link", "iframe", "object"} & set(page.tags())
    css = "".join(page.text["style"])
    assert "@import" not in css
    assert "url(" not in css
    policy = next(attrs for _, attrs in page.elements if "http-equiv" in attrs)
    assert "default-src 'none'" in policy["content"]


def test_every_colour_of_the_curves_is_named_for_light_and_for_dark():
    html = render(run(), "mine")
    light, dark = html.split("prefers-color-scheme: dark", 1)
    dark = dark[: dark.index("\n}")]
    for name in set(re.findall(r"var\((--\w+)\)", html)):
        assert f"{name}: #" in light
        assert f"{name}: #" in dark


def test_the_page_can_be_walked_by_its_headings_and_tables_by_their_heads():
    page = Page(render(run(), "mine"))
    headings = [tag for tag in page.tags() if re.fullmatch(r"h\d", tag)]
    assert headings == ["h1"] + ["h2"] * 5
    heads = [attrs for tag, attrs in page.elements if tag == "th"]
    assert all(attrs.get("scope") in ("row", "col") for attrs in heads)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.elements
    )


def test_the_same_metrics_give_the_same_page_wherever_they_lie(tmp_path: Path):
    """Drawn from metrics.jsonl alone: nothing else of the run is there, or looked at."""
    lines = "".join(json.dumps(event) + "\n" for event in run())
    pages = []
    for home in ("a", "b"):
        folder = tmp_path / home / "mine"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        pages.append(write_report(folder).read_bytes())
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_numbers_that_are_none_are_dashes(bad: float | None):
    events = run()
    for event in events:
        for name in ("loss", "grad_norm", "val_ppl", "val_bpb", "tokens_per_s", "seconds"):
            event[name] = bad
    page = Page(render(events, "mine"))
    assert headline(page)["Time"] == headline(page)["Bits a byte"] == "–"
    assert headline(page)["Validation loss"] == "2.000"
    assert "Speed" not in headline(page)
    for event in events:
        event["val_loss"] = bad
    assert "Validation loss" not in headline(Page(render(events, "mine")))


def test_a_page_of_a_long_run_stays_small_and_says_what_it_leaves_out():
    events = run(100_000)
    html = render(events, "mine")
    assert len(html) < 1_000_000
    page = Page(html)
    assert "20 of 400 samples." in page.text["p"]
    assert {"step 250", "step 100,000"} <= set(page.text["summary"])
    numbers = html[html.index("In numbers") : html.index("</details>")]
    assert numbers.count("<tr") == 1 + 100


@pytest.mark.parametrize("events", [[{"event": "end", "step": 3}], run(0, end=""), run(10, end="")])
def test_a_run_that_has_hardly_begun_has_a_page(events: list[dict]):
    page = Page(render(events, "mine"))
    assert headline(page)["Steps"] == str(events[-1]["step"])
