"""The server's page as a person has it, in a browser that Selenium drives."""

import json

from command_kit import wait_until
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select


class Page:
    """The page as a person has it: fields, keys, and what is to be seen."""

    def __init__(self, driver):
        self.driver, self.script = driver, driver.execute_script
        self.origin = ""

    def open(self, server):
        self.origin = server.url
        self.driver.get(server.url)

    def ready(self):
        self.wait(lambda: self.one("#write").is_enabled())
        return self

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector, column=0):
        found = self.all(selector)
        return found[min(column, len(found) - 1)]

    def fill(self, column=0, **values):
        """Set fields by their names, those too that are folded away."""
        for name, value in values.items():
            field = self.one(f"[name={name}]", column)
            if name in ("model", "preset"):
                Select(field).select_by_value(value)
                continue
            self.script("arguments[0].closest('details')?.setAttribute('open', '')", field)
            field.clear()
            field.send_keys(str(value))

    def prompt(self, text):
        self.one("#prompt").clear()
        self.one("#prompt").send_keys(text)

    def write(self):
        """With the keyboard, up to the end."""
        self.one("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
        self.wait(lambda: not self.one("#stop").is_enabled())

    def text(self, column=0):
        """What stands in a column, prompt and all."""
        return self.script(
            "return document.querySelectorAll('.text')[arguments[0]].textContent", column
        )

    def emulate(self, width, height, mobile):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
        )

    def scheme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def card(self):
        """The rows of a token's card: its probabilities as exact numbers, and what is said."""
        rows = self.all("#card tbody tr")
        numbers = [
            [float(data.get_attribute("value")) for data in row.find_elements(By.TAG_NAME, "data")]
            for row in rows
        ]
        return numbers, [row.text for row in rows]

    def complaints(self):
        """What the browser's console was told since the last call."""
        log = self.driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def asked(self):
        """Every address that the page asked for since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    wait = staticmethod(wait_until)
