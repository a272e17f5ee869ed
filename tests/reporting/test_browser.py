"""The report in a real browser: headless Chromium, driven by Playwright, with the network recorded."""

import importlib.util
import os
import re
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    missing = [
        what
        for what, found in (("the package playwright", importlib.util.find_spec("playwright")), ("chromium", CHROMIUM))
        if not found
    ]
    if missing:
        reason = f"needs {' and '.join(missing)} (pip install playwright; apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def scheme():
    return "light"


both_schemes = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture
def tab(browser, page, scheme):
    """The page in a tab of its own. When it closes: there was no request and no error."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1240, "height": 900})
    tab = context.new_page()
    requests, errors = [], []
    tab.on("request", lambda item: requests.append(item.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("dialog", lambda dialog: (errors.append(f"a dialog opened: {dialog.message}"), dialog.dismiss()))
    tab.goto(page.as_uri())
    tab.wait_for_selector(".plot .heatmaplayer image, .plot .heatmaplayer .hm")
    yield tab
    context.close()
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    assert errors == []


def heads_plot(tab):
    plot = tab.locator(".plot").nth(1)
    plot.scroll_into_view_if_needed()
    return plot


def click_cell(tab, plot, row, column, rows=30, columns=9):
    """Click the middle of a cell of a heatmap, rows counted from the top."""
    box = plot.locator(".nsewdrag").first.bounding_box()
    x = box["x"] + box["width"] * (column + 0.5) / columns
    y = box["y"] + box["height"] * (row + 0.5) / rows
    point_and_click(tab, x, y)


def point_and_click(tab, x, y):
    tab.mouse.move(x, y)
    tab.wait_for_timeout(150)  # plotly looks at the pointer every 50 ms: no hand is faster
    tab.mouse.click(x, y)


@both_schemes
def test_clicking_a_cell_shows_its_numbers(tab):
    plot = heads_plot(tab)
    click_cell(tab, plot, 21, 1)
    details = plot.locator(".details")
    details.get_by_text("L21H1").wait_for()
    text = details.inner_text()
    for part in ("0.580", "0.550 to 0.610", "0.522", "● yes", "64", "clean 3.52, corrupted −3.41"):
        assert part in text
    click_cell(tab, plot, 3, 4)  # an undefined cell
    details.get_by_text("L3H4").wait_for()
    assert "undefined" in details.inner_text()


def test_clicking_a_bar_shows_its_numbers(tab):
    plot = tab.locator(".plot").nth(2)
    plot.scroll_into_view_if_needed()
    box = plot.locator(".bars .point path").first.bounding_box()
    point_and_click(tab, box["x"] + 10, box["y"] + box["height"] / 2)
    plot.locator(".details").get_by_text("L21H1").wait_for()


def test_keyboard_reaches_every_cell(tab):
    plot = heads_plot(tab)
    plot.locator(".canvas").focus()
    for key in ["ArrowDown"] * 3 + ["ArrowRight"] * 2 + ["ArrowUp"]:
        tab.keyboard.press(key)
    assert plot.locator(".details h3").inner_text() == "L1H2"
    panels = tab.locator(".plot").first
    panels.locator(".canvas").focus()
    for _ in range(7):  # past the last column lies the next panel
        tab.keyboard.press("ArrowRight")
    assert panels.locator(".details h3").inner_text() == "0 · S1"


@both_schemes
def test_theme_follows_the_system_and_the_button(tab, scheme):
    root = tab.locator("html")
    assert root.get_attribute("data-theme") == scheme

    def colours():
        return tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor, document.querySelector('.plot .xtick text').style.fill]"
        )

    before = colours()
    tab.get_by_role("button", name=re.compile("theme")).click()
    assert root.get_attribute("data-theme") != scheme
    assert all(one != other for one, other in zip(before, colours(), strict=True))


@both_schemes
def test_attention_is_drawn_and_heads_can_be_chosen(tab):
    view = tab.locator(".attention")
    view.scroll_into_view_if_needed()
    view.locator(".pattern canvas").first.wait_for()
    tab.wait_for_timeout(300)
    inked = """() => {
        const canvas = [...document.querySelectorAll('.pattern canvas')].find((one) => one.offsetParent);
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let blue = 0;
        for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] && pixels[i + 2] - pixels[i] > 60) blue++;
        return blue / (pixels.length / 4);
    }"""
    assert tab.evaluate(inked) > 0.01
    view.get_by_role("radio", name="L22H4").click()
    assert view.locator(".note").inner_text() == "L22H4 · name mover"
    tab.keyboard.press("ArrowRight")
    assert view.get_by_role("radio", name="L24H8").get_attribute("aria-checked") == "true"
    view.get_by_text("Largest weights as a table").click()
    view.locator("tbody tr").first.wait_for()
    assert view.locator("tbody tr").count() == 6 * 14


def test_numbers_as_a_sortable_table(tab):
    plot = heads_plot(tab)
    plot.get_by_text("Numbers as a table").click()
    rows = plot.locator("tbody tr")
    rows.first.wait_for()
    assert rows.count() == 270
    plot.get_by_role("button", name="effect", exact=True).click()
    assert rows.first.locator("td").first.inner_text() == "L21H1"
    assert "undefined" in rows.last.inner_text()
    plot.get_by_role("button", name="effect", exact=True).click()
    assert rows.first.locator("td").first.inner_text() == "L22H4"
    assert "undefined" in rows.last.inner_text()


def test_figures_can_be_saved(tab):
    plot = heads_plot(tab)
    with tab.expect_download() as csv:
        plot.get_by_role("button", name="CSV of this figure").click()
    lines = csv.value.path().read_text().splitlines()
    assert csv.value.suggested_filename == "heads-at-end-denoising.csv"
    assert lines[0] == "label,effect,ci_low,ci_high,control,passes" and len(lines) == 271
    assert lines[1].startswith("L0H0,,")
    with tab.expect_download() as svg:
        plot.get_by_role("button", name="SVG of this figure").click()
    text = svg.value.path().read_text()
    assert text.startswith("<svg") and "Heads at END, denoising" in text


def test_hostile_labels_stay_text(tab):
    assert tab.locator("script").count() == tab.evaluate("document.scripts.length")
    assert "alert(1)" in tab.locator(".prompt").last.inner_text()
    tab.locator(".plot").last.locator(".canvas").focus()
    tab.keyboard.press("ArrowDown")
    assert "<script>" in tab.locator(".plot").last.locator(".details h3").inner_text()


def test_narrow_screens_do_not_scroll_sideways(tab):
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.wait_for_timeout(500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
