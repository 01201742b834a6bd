"""The page in a real browser: Debian's chromium and chromium-driver, without a window."""

import io
import os
import threading
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from amt_ray.report.compare import compare
from amt_ray.report.live import Live
from amt_ray.report.store import Wanted

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1400,900")


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM.exists() and DRIVER.exists()):
        message = f"{CHROMIUM} and {DRIVER} are needed (Debian: chromium, chromium-driver)."
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(store):
    (path,) = compare(
        store.uri, sweep=store.seeds, out=[store.folder / "page.html"], console=Console(file=io.StringIO())
    )
    return path.as_uri()


@pytest.fixture
def opened(browser, page):
    browser.get(page)
    return browser


def column(driver, heading):
    heads = [head.text.split("\n")[0] for head in driver.find_elements(By.CSS_SELECTOR, "#ranking thead button")]
    place = heads.index(heading) + 1
    return [
        cell.text
        for cell in driver.find_elements(By.CSS_SELECTOR, f"#ranking tbody tr:first-child td:nth-child({place})")
    ]


def click(driver, selector, number=0):
    element = driver.find_elements(By.CSS_SELECTOR, selector)[number]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def heading(driver, name):
    """Place of a heading's button."""
    return [b.text for b in driver.find_elements(By.CSS_SELECTOR, "#ranking thead button")].index(name)


def test_page__draws_every_figure_and_the_console_stays_empty(opened):
    figures = opened.find_elements(By.CSS_SELECTOR, ".plotly-graph-div")
    assert len(figures) >= 6 and all(f.find_elements(By.CSS_SELECTOR, "svg.main-svg") for f in figures)
    assert opened.get_log("browser") == []


def test_page__a_click_on_a_heading_sorts_and_a_second_click_turns_the_order(opened):
    shown = [float(text) for text in column(opened, "throw_ratio")]
    click(opened, "#ranking thead button", heading(opened, "throw_ratio"))
    assert [float(text) for text in column(opened, "throw_ratio")] == sorted(shown) != shown
    click(opened, "#ranking thead button", heading(opened, "throw_ratio"))
    assert [float(text) for text in column(opened, "throw_ratio")] == sorted(shown, reverse=True)
    assert opened.find_elements(By.CSS_SELECTOR, "#ranking th[aria-sort=descending]")[0].text.startswith("throw_ratio")


def test_page__a_click_unfolds_the_seeds_of_a_setting(opened):
    def seen():
        return [row.text for row in opened.find_elements(By.CSS_SELECTOR, "tr.single") if row.is_displayed()]

    assert seen() == []
    click(opened, ".unfold")
    assert [text.split()[:2] for text in seen()] == [["seed", "0"], ["seed", "1"], ["seed", "2"]]


def test_page__choosing_two_runs_shows_their_difference_down_to_a_package(opened):
    first, second = (Select(opened.find_element(By.ID, name)) for name in ("first", "second"))
    names = [option.text for option in first.options]
    first.select_by_index(names.index(next(n for n in names if n.startswith("amt 0.40 0.20 seed=0"))))
    second.select_by_index(names.index(next(n for n in names if n.startswith("amt 0.60 0.20 seed=1"))))
    rows = [
        tuple(cell.text for cell in row.find_elements(By.TAG_NAME, "td"))
        for row in opened.find_elements(By.CSS_SELECTOR, "#diff tbody tr:not(.section)")
    ]
    assert {("masking.mask_ratio", "0.40", "0.60"), ("seed", "0", "1"), ("numpy", "2.1", "2.3")} <= set(rows)
    assert not [row for row in rows if row[0] in ("torch", "masking.throw_ratio")]


@pytest.mark.parametrize("width", [390, 1400])
def test_page__never_scrolls_sideways(browser, page, width):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get(page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page__is_readable_without_colour(opened):
    """What colour says is said again by dash or marker, by a word, or by a number in the cell."""
    drawn = opened.execute_script(
        "return Array.from(document.querySelectorAll('.plotly-graph-div'), figure => figure.data"
        ".filter(t => t.type === 'scatter' && t.showlegend !== false && t.name).map(t => [t.line, t.marker]))"
    )
    for traces in drawn:
        looks = [((line or {}).get("dash"), (marker or {}).get("symbol")) for line, marker in traces]
        assert len(set(looks)) == len(looks)
    cells = opened.execute_script(
        "const figures = Array.from(document.querySelectorAll('.plotly-graph-div'));"
        "const map = figures.find(figure => figure.data[0].type === 'heatmap');"
        "return [map.data[0].z.flat().length, map.layout.annotations.map(a => a.text)]"
    )
    assert cells[0] == len(cells[1]) and "✕" in cells[1]
    assert "baseline" in column(opened, "note")


def test_live__serves_the_page_and_renews_it_only_when_runs_have_changed(store):
    live = Live(store.uri, Wanted(store.live))
    try:
        assert not live.look()
        mark = live.state.mark
        store.client.set_tag(store.running, "amt_ray.progress", "0.5")
        store.client.log_metric(store.running, "system/system_memory_usage_megabytes", 5.0, step=1)
        assert not live.look()
        store.client.log_metric(store.running, "train/loss", 0.7, step=1)
        assert live.look() and live.state.mark != mark and live.state.mark in live.state.html
    finally:
        live.server.server_close()


def test_live__the_page_follows_and_keeps_order_and_place(browser, store):
    live, stop = Live(store.uri, Wanted(store.live)), threading.Event()
    following = threading.Thread(target=live.follow, args=(stop, Console(file=io.StringIO())))
    following.start()
    try:
        browser.get(live.url)
        assert live.url.startswith("http://127.0.0.1:")
        click(browser, "#ranking thead button", heading(browser, "mask_ratio"))
        browser.execute_script("scrollTo(0, 700)")
        store.client.log_metric(store.running, "eval/knn_top1", 0.97, step=2)
        # the page is loaded anew by itself
        WebDriverWait(browser, 30, ignored_exceptions=[Exception]).until(lambda driver: "97.0%" in driver.page_source)
        WebDriverWait(browser, 10).until(lambda driver: abs(driver.execute_script("return scrollY") - 700) < 5)
        assert browser.find_element(By.CSS_SELECTOR, "#ranking th[aria-sort=ascending]").text.startswith("mask_ratio")
        assert "Best so far" in browser.find_element(By.CSS_SELECTOR, ".answer").text
        assert browser.get_log("browser") == []
    finally:
        stop.set()
        following.join(30)
    with pytest.raises(OSError):
        urllib.request.urlopen(live.url, timeout=5)
