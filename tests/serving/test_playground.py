"""The page in a real browser: it shows what the API says, and asks nobody else."""

import os
import shutil

import pytest
from page_kit import Page
from run_kit import TALKING, make_run
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from serving_kit import running

from octavo.text.tokenizer import Tokenizer

INSTALL = "sudo apt-get install -y chromium chromium-driver"
MARKUP = Tokenizer.train_bpe(['<b>bis</b> <img src="x"> &lt; ' * 99], 290)  # partial letters too
NUCLEUS = {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture(scope="module")
def driver():
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    helper = shutil.which("chromedriver")
    if not (browser and helper):
        pytest.skip(f"the page is not tested: there is no Chromium; {INSTALL}")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("headless=new", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{word}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(helper))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    base = make_run(folder / "base")
    talker = make_run(folder / "talker", TALKING, seed=1, chat=True)
    with running(base, talker, make_run(folder / "markup", MARKUP), tokens=100000) as found:
        yield found


@pytest.fixture
def page(driver, server):
    page = Page(driver)
    page.emulate(1280, 900, False)
    page.scheme("light")
    page.open(server)
    yield page.ready()
    assert page.complaints() == []
    assert [url for url in page.asked() if not url.startswith((page.origin, "data:"))] == []


def answered(server, path="completions", **body):
    """The choice that the API gives."""
    with server.http() as http:
        answer = http.post(f"/v1/{path}", json={"explain": True, **body}).json()
    return answer["choices"][0]


def test_what_it_writes_is_what_the_api_says(page, server):
    page.prompt("abc")
    page.fill(preset="nucleus", seed=5, max_tokens=150, stop=r"\n")
    page.fill(repetition_penalty=1.1)  # a preset of one's own
    assert page.one("[name=preset]").get_attribute("value") == "own"
    page.write()
    how = NUCLEUS | {"repetition_penalty": 1.1, "seed": 5, "stop": "\n", "max_tokens": 150}
    wanted = answered(server, prompt="abc", **how)
    assert page.text() == "abc" + wanted["text"]
    assert page.one(".pace").text.startswith(f"{len(wanted['tokens'])} token")
    assert "tokens/s" in page.one(".pace").text or len(wanted["tokens"]) < 3
    assert "seed 5" in page.one(".pace").text
    assert wanted["finish_reason"] == "stop"
    assert "the text ended" in page.one(".pace").text
    page.one("[name=onward]").click()
    assert page.one("#prompt").get_attribute("value") == "abc" + wanted["text"]


def test_presets_are_the_servers(page, server):
    with server.http() as http:
        presets = http.get("/v1/models").json()["data"][0]["presets"]
    for name, settings in presets.items():
        page.fill(preset=name)
        for field in ("temperature", "top_k", "top_p"):
            shown = float(page.one(f"[name={field}]").get_attribute("value"))
            assert shown == settings.get(field, {"top_k": 0}.get(field, 1))


def test_an_empty_prompt_begins_a_text_and_a_kept_seed_writes_it_again(page):
    page.write()
    text = page.text()
    page.one("[name=again]").click()
    page.write()
    assert page.text() == text
    page.fill(seed="")
    page.write()
    assert page.text() != text


def test_it_flows_and_escape_stops_it_at_the_server_too(page, server):
    page.prompt("abc")
    page.fill(max_tokens=90000)
    page.one("#write").click()
    lengths = [0]
    for _ in range(3):
        page.wait(lambda: len(page.text()) > lengths[-1])
        lengths.append(len(page.text()))
    assert page.one("#stop").is_enabled()
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.wait(lambda: "stopped" in page.one(".pace").text)
    page.wait(lambda: server.models.idle)
    assert 3 < len(page.text()) < 90000
    assert not page.one("#stop").is_enabled()


def test_a_tokens_alternatives_are_the_apis(page, server):
    """By hovering, by a click that pins them, and by the arrow keys."""
    page.prompt("abc")
    page.fill(temperature=0.8, top_k=5, top_p=0.7, seed=3, max_tokens=40)
    page.write()
    tokens = answered(
        server, prompt="abc", temperature=0.8, top_k=5, top_p=0.7, seed=3, max_tokens=40
    )["tokens"]
    spans = page.all(".text .t")
    assert len(spans) == len(tokens)
    for i in (0, 7):
        webdriver.ActionChains(page.driver).move_to_element(spans[i]).perform()
        page.wait(lambda: page.one("#card").is_displayed())
        rows = tokens[i]["alternatives"]
        if tokens[i]["id"] not in [row["id"] for row in rows]:
            rows = [*rows, tokens[i] | {"cut": None}]
        numbers, texts = page.card()
        assert numbers == [[row["p"], row["q"]] for row in rows]
        for row, text in zip(rows, texts, strict=True):
            cut = {"top_k": "cut: top-k", "top_p": "cut: top-p", None: ""}[row.get("cut")]
            assert text.endswith(cut) if cut else "cut" not in text
        for name, gone in tokens[i]["cut"].items():
            said = f"{name.replace('_', '-')} cut away {gone['tokens']} token"
            assert said in page.one("#card").text
    webdriver.ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    assert not page.one("#card").is_displayed()
    spans[7].click()
    webdriver.ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    assert page.one("#card").is_displayed()
    page.one(".text").send_keys(Keys.ARROW_RIGHT)
    assert page.card()[0][0][0] == tokens[8]["alternatives"][0]["p"]
    assert "instead: " in page.one("#said").text
    page.one(".text").send_keys(Keys.ESCAPE)
    assert not page.one("#card").is_displayed()


def test_the_less_probable_the_stronger_the_shade(page, server):
    page.prompt("abc")
    page.fill(seed=1, max_tokens=60)
    page.write()
    tokens = answered(server, prompt="abc", seed=1, max_tokens=60)["tokens"]
    read = "return [...document.querySelectorAll('.text .t')].map(s => %s)"
    shades = [float(v) for v in page.script(read % "s.style.getPropertyValue('--v')")]
    by_p = [shade for _, shade in sorted(zip([t["p"] for t in tokens], shades, strict=True))]
    assert by_p == sorted(by_p, reverse=True)
    assert by_p[0] > by_p[-1]
    page.one("#shades").click()
    assert set(page.script(read % "getComputedStyle(s).backgroundColor")) == {"rgba(0, 0, 0, 0)"}


def test_two_settings_and_two_models_side_by_side(page, server):
    page.prompt("abc")
    page.fill(max_tokens=50, preset="conservative")
    page.one("#two").click()
    assert page.one("[name=model]", 1).get_attribute("value") == "talker"
    page.fill(1, model="base", temperature=2, seed=9)
    page.fill(0, seed=9)
    page.write()
    for column, how in enumerate([{"temperature": 0.6}, {"temperature": 2}]):
        how |= {"seed": 9, "max_tokens": 50, "top_k": 40}
        assert page.text(column) == "abc" + answered(server, prompt="abc", **how)["text"]
    first, second = (column.rect for column in page.all(".column"))
    assert second["x"] >= first["x"] + first["width"]
    assert second["y"] == first["y"]
    page.fill(0, seed="")
    page.fill(1, seed="")
    page.write()  # with one new seed: only the settings differ
    seeds = [pace.text.split("seed ")[1].split(",")[0] for pace in page.all(".pace")]
    assert seeds[0] == seeds[1]
    page.one("#two").click()
    assert [column.is_displayed() for column in page.all(".column")] == [True, False]


def test_a_chat_goes_through_the_runs_template(page, server):
    assert not page.one("[name=chat]").is_displayed()
    page.fill(model="talker", seed=2, max_tokens=30)
    assert page.one("[name=chat]").is_selected()
    page.prompt("abc")
    page.write()
    messages = [{"role": "user", "content": "abc"}]
    asked = {"model": "talker", "messages": messages, "seed": 2, "max_tokens": 30}
    assert page.text() == answered(server, "chat/completions", **asked)["message"]["content"]


def test_markup_that_a_model_writes_is_text(page, server):
    page.fill(model="markup", seed=4, max_tokens=600)
    page.prompt("<b>&lt;")
    page.write()
    wanted = answered(server, model="markup", prompt="<b>&lt;", seed=4, max_tokens=600)
    assert page.text() == "<b>&lt;" + wanted["text"]
    assert "" in [token["text"] for token in wanted["tokens"]]  # part of a character
    page.script("""
        const token = { id: 1, text: "<img src=x>&lt;<b>", p: 0.5, q: 0.5, cut: {} };
        columns[0].begin("<b>");
        columns[0].take({ tokens: [{ ...token, alternatives: [{ ...token, cut: null }] }] }, 0);
        columns[0].draw();
        columns[0].show(0);""")
    assert page.text() == "<b><img src=x>&lt;<b>"
    assert "<img␣src=x>&lt;…" in page.one("#card h2").text
    assert "<img␣src=x>&lt;…" in page.one("#card td").text
    assert page.all("#card :is(b, img)") == []
    assert page.all(".text :not(div):not(span)") == []


def test_the_policy_lets_nothing_run_but_the_page_itself(page):
    page.script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">');"
        "const s = document.createElement('script'); s.textContent = 'window.ran = 2';"
        "document.body.append(s)"
    )
    refused = []
    page.wait(lambda: refused.extend(page.complaints()) or len(refused) >= 2)
    assert all("Content Security Policy" in line for line in refused)
    assert page.script("return window.ran") is None


def test_errors_are_said_plainly(page, server):
    page.prompt("abcΩ")
    page.write()
    with server.http() as http:
        wanted = http.post("/v1/completions", json={"prompt": "abcΩ"}).json()["error"]["message"]
    assert page.one(".column .error").text == wanted
    assert page.one(".column .error").get_attribute("role") == "alert"
    assert len(page.complaints()) == 1  # the browser's own line about the 400
    page.prompt("abc")
    page.fill(top_p=3)
    page.write()
    assert page.one(".column .error").text.startswith("top-p: ")
    page.fill(top_p=1)
    page.write()
    assert not page.one(".column .error").is_displayed()


def test_a_server_with_a_key_and_one_that_is_gone(driver, tmp_path):
    page = Page(driver)
    with running(make_run(tmp_path / "base"), key="open sesame") as server:
        page.open(server)
        page.wait(lambda: page.one("#key").is_displayed())
        assert not page.one("#write").is_enabled()
        page.fill(key="wrong")
        page.one("#key button").click()
        page.wait(lambda: "key" in page.one("#trouble").text)
        page.fill(key="open sesame")
        page.one("#key button").click()
        page.ready()
        assert not page.one("#key").is_displayed()
        assert not page.one("#trouble").is_displayed()
        page.write()
        assert len(page.text()) > 1
        page.driver.refresh()  # the tab knows it now
        page.ready()
    page.write()
    assert page.one(".column .error").text == "The server cannot be reached."
    page.complaints(), page.asked()


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page):
    page.emulate(390, 844, True)
    page.one("#two").click()
    for column in (0, 1):
        page.fill(column, max_tokens=300, model="markup", seed=16)
    page.prompt("<" * 60)
    page.write()
    page.all(".text .t")[5].click()
    assert page.one("#card").is_displayed()
    assert page.script("return document.documentElement.scrollWidth") <= 390
    boxes = page.script(
        "return [...document.querySelectorAll('button, input, select, #card, .t')]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.right])"
    )
    assert min(left for left, _ in boxes) >= 0
    assert max(right for _, right in boxes) <= 390
    token, card = (page.script("return arguments[0].getBoundingClientRect()", page.one(s))
                   for s in (".t.here", "#card"))  # fmt: skip
    assert token["bottom"] <= card["top"]


@pytest.mark.parametrize("name", ["light", "dark"])
def test_both_schemes_can_be_read(page, name):
    """WCAG asks for a contrast of 4.5 for text; on a shade, ink flips where the other is better."""
    page.scheme(name)
    page.driver.refresh()
    page.ready()
    colours = page.script("""
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        const over = (...all) => {
          for (const c of all) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
          return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        };
        const of = (e) => getComputedStyle(e);
        for (let n = 0; n <= 100; n++) {
          const token = el("span", { class: "t" }, "a");
          shade(token, 10 ** (-n / 25));
          document.querySelector(".text").append(token);
        }
        return [...document.querySelectorAll("body, .soft, label, #write, .t")].map(
          (e) => [over(of(e).color), over(of(e.closest(".column") ?? document.body).backgroundColor,
            of(e).backgroundColor)]);""")

    def light(colour):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                 for c in (value / 255 for value in colour)]  # fmt: skip
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05

    (ink, ground), *_ = colours
    assert (light(ink) < light(ground)) == (name == "light")
    for ink, ground in colours:
        assert max(light(ink), light(ground)) / min(light(ink), light(ground)) >= 4.5


def test_a_screen_reader_is_told_the_beginning_and_the_end(page):
    fields = page.script("return [...document.querySelectorAll('input, select, textarea')]"
                         ".filter(e => !e.labels.length).map(e => e.name)")  # fmt: skip
    assert fields == []
    page.script(
        "window.told = []; new MutationObserver(() => told.push(said.textContent))"
        ".observe(said, {childList: true})"
    )
    page.fill(max_tokens=2000)
    page.prompt("abc")
    page.write()
    told = page.script("return told")
    assert told[0] == "writing"
    assert told[1].startswith("first: 2,000 tokens, ")
    assert len(told) == 2
