"""The picture of the server's page in README, from a server that runs:

octavo serve runs/quickstart
python scripts/playground_picture.py http://127.0.0.1:8000 docs/pictures/playground.png
"""

import shutil
import sys

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

PROMPT, SEED, TOKENS = "The function returns ", 4, 160
# A token of the first lines with some alternatives left and some cut away.
TELLING = "t => (n => n > 2 && n < 6)(t.alternatives.filter(a => !a.cut).length)"


def main(url: str, file: str) -> None:
    """Write with a preset and a hotter setting side by side, and point at a token."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": 1180, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(url)
        wait = WebDriverWait(driver, 60)
        write, stop = (driver.find_element(By.ID, name) for name in ("write", "stop"))
        wait.until(lambda _: write.is_enabled())
        driver.find_element(By.ID, "prompt").send_keys(PROMPT)
        Select(driver.find_element(By.NAME, "preset")).select_by_value("nucleus")
        for name, value in {"seed": SEED, "max_tokens": TOKENS}.items():
            field = driver.find_element(By.NAME, name)
            field.clear()
            field.send_keys(str(value))
        driver.find_element(By.ID, "two").click()
        first, second = driver.find_elements(By.CSS_SELECTOR, ".column")
        model = first.find_element(By.NAME, "model").get_attribute("value")
        Select(second.find_element(By.NAME, "model")).select_by_value(model)
        hotter = second.find_element(By.NAME, "temperature")
        hotter.clear()
        hotter.send_keys("1.3")
        write.click()
        wait.until(lambda _: not stop.is_enabled())
        shown = driver.execute_script(f"return columns[0].tokens.findIndex({TELLING})")
        token = first.find_elements(By.CSS_SELECTOR, ".t")[shown]
        webdriver.ActionChains(driver).move_to_element(token).perform()
        driver.save_screenshot(file)
    finally:
        driver.quit()


main(*sys.argv[1:])
