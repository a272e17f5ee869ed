"""The report in a real browser: headless Chromium, driven by Playwright, with the network recorded."""

import csv
import importlib.util
import os
import re
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '</script><script>alert(1)</script><b onclick="alert(2)">'
VIEWPORT = {"width": 1240, "height": 900}
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


@pytest.fixture(scope="module")
def scheme():
    return "light"


both_schemes = pytest.mark.parametrize("scheme", ["light", "dark"], scope="module")


@pytest.fixture(scope="module")
def opened(browser, page, scheme):
    """The page in a tab, once for many tests, and what it asked for and complained about."""
    context = browser.new_context(color_scheme=scheme, viewport=VIEWPORT)
    tab = context.new_page()
    requests, errors = [], []
    tab.on("request", lambda item: requests.append(item.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("dialog", lambda dialog: (errors.append(f"a dialog opened: {dialog.message}"), dialog.dismiss()))
    tab.goto(page.as_uri())
    tab.wait_for_selector(".plot .heatmaplayer image, .plot .heatmaplayer .hm")
    yield tab, requests, errors
    context.close()


@pytest.fixture
def tab(opened, page):
    """The shared tab, in which other tests may have selected something. After each: no request and no error."""
    tab, requests, errors = opened
    yield tab
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    assert errors == []


def heads_plot(tab):
    plot = tab.locator(".plot").nth(1)
    plot.scroll_into_view_if_needed()
    return plot


def plot_named(tab, title):
    plot = tab.locator(".plot").filter(has=tab.locator("figcaption", has_text=re.compile(f"^{title}$")))
    plot.scroll_into_view_if_needed()
    return plot


def press(tab, plot, keys):
    plot.locator(".canvas").focus()
    for key in keys.split():
        tab.keyboard.press(f"Arrow{key}")
    return plot.locator(".details")


def csv_of(tab, plot):
    with tab.expect_download() as download:
        plot.get_by_role("button", name="CSV of this figure").click()
    with download.value.path().open(newline="") as file:
        return list(csv.reader(file))


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
    click_cell(tab, plot, 0, 0)
    assert press(tab, plot, "Down Down Right Right Up").locator("h3").inner_text() == "L1H2"
    panels = tab.locator(".plot").first  # no other test selects in it: the first press selects the first cell
    assert press(tab, panels, "Down").locator("h3").inner_text() == "0 · IO"
    assert press(tab, panels, "Right " * 6).locator("h3").inner_text() == "0 · S1"  # past the last column: next panel
    assert panels.locator(".shapelayer path").count() == 1


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
    tab.get_by_role("button", name=re.compile("theme")).click()
    assert root.get_attribute("data-theme") == scheme and colours() == before


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


@both_schemes
def test_clicking_a_point_of_a_curve_shows_its_numbers(tab):
    plot = plot_named(tab, "Probability by layer")
    box = plot.locator(".scatterlayer .points path").nth(3).bounding_box()  # of "answer": 0, 1, 3, then 4
    point_and_click(tab, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    details = plot.locator(".details")
    details.get_by_text("answer · layer 4").wait_for()
    text = details.inner_text()
    for part in ("probability\n0.800", "95% interval\n0.640 to 0.880", "n\n64"):
        assert part in text
    assert plot.locator(".shapelayer path").count() == 1  # the line at its x
    assert plot.locator(".scatterlayer .trace").count() == 5  # three lines, one band, and the ring


def test_hovering_over_a_curve_shows_its_numbers(tab):
    plot = plot_named(tab, "Probability by layer")
    box = plot.locator(".scatterlayer .points path").nth(3).bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = plot.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert label.text_content() == "answer · layer 4probability 0.895% interval 0.64 to 0.88"


def test_keyboard_reaches_every_point_of_a_curve(tab):
    plot = plot_named(tab, "Probability by layer")

    def after(keys):
        return press(tab, plot, keys).locator("h3").inner_text()

    # At layer 0 from the top: "wrong" 0.105, the control 0.05, the answer 0.01.
    assert after("Left " * 6 + "Up " * 3) == "wrong · layer 0"
    assert after("Down") == "another prompt's answer · layer 0" and after("Down Down") == "answer · layer 0"
    assert after("Right Right") == "answer · layer 2"  # undefined, and not left out
    assert "probability\nundefined" in plot.locator(".details").inner_text()
    # At layer 3: the answer 0.4, "wrong" 0.3, the control.
    assert after("Right") == "answer · layer 3" and after("Up") == "answer · layer 3"
    assert after("Down") == "wrong · layer 3" and after("Down") == "another prompt's answer · layer 3"
    assert after("Down Up Right Right") == "wrong · layer 4"


def test_curves_as_table_and_csv(tab):
    plot = plot_named(tab, "Probability by layer")
    rows = csv_of(tab, plot)
    assert rows[0] == ["line", "layer", "probability", "ci_low", "ci_high"] and len(rows) == 16
    assert rows[4][:3] == ["answer", "3", "0.4"] and float(rows[4][4]) == pytest.approx(0.44)
    assert rows[3] == ["answer", "2", "", "", ""] and rows[11] == ["another prompt's answer", "0", "0.05", "", ""]
    plot.get_by_text("Numbers as a table").click()
    plot.locator("tbody tr").first.wait_for()
    assert plot.locator("thead th").all_inner_texts() == ["line", "layer", "probability", "95% low", "95% high"]
    assert plot.locator("tbody tr").nth(3).locator("td").all_inner_texts() == ["answer", "3", "0.400", "0.320", "0.440"]


def test_small_numbers_keep_their_digits_and_a_log_axis_its_zero(tab):
    plot = plot_named(tab, "KL")
    assert plot.locator(".points path").count() == 4  # the zero is not drawn
    assert "0.00031" in [row[2] for row in csv_of(tab, plot)]
    assert "3.10e\u22124" in press(tab, plot, "Left " * 5 + "Right " * 3).inner_text()
    assert "KL (nats)\n0" in press(tab, plot, "Right").inner_text()
    assert "1 at or below 0 not drawn" in plot.locator(".annotation").text_content()


@both_schemes
def test_tokens_stand_in_their_cells(tab):
    plot = plot_named(tab, "Logit lens")
    drawn = [text for text in plot.locator(".heatmap-label").all_text_contents() if text]
    assert len(drawn) == 19  # the undefined cell has none
    assert {"·Paris", "↵", "∅", "·antidis…"} <= set(drawn) and HOSTILE[:8] + "…" in drawn
    click_cell(tab, plot, 0, 1, rows=5, columns=4)  # the top row is the last layer
    details = plot.locator(".details")
    details.get_by_text("layer 4 at ·capital").wait_for()
    assert "token in the cell\n·antidisestablishment" in details.inner_text()
    assert "rank\n850" in details.inner_text()


def test_keyboard_moves_up_where_the_first_row_is_the_lowest(tab):
    plot = plot_named(tab, "Logit lens")
    assert press(tab, plot, "Down " * 5 + "Left " * 4).locator("h3").inner_text() == "layer 0 at The"
    assert press(tab, plot, "Up Up Right").locator("h3").inner_text() == "layer 2 at ·capital"
    assert press(tab, plot, "Down Down Down").locator("h3").inner_text() == "layer 0 at ·capital"


def test_token_grid_as_csv(tab):
    rows = csv_of(tab, plot_named(tab, "Logit lens"))
    assert rows[0] == ["label", "probability", "text", "rank"] and len(rows) == 21
    assert rows[3][2] == HOSTILE and rows[4][2] == "\n" and rows[17][2] == " Paris"
    assert rows[7] == ["layer 1 at ·of", "", HOSTILE, "300"]


@both_schemes
def test_attention_follows_the_theme(tab, scheme):
    card, page = (
        tab.locator(where).evaluate(
            "one => { while (getComputedStyle(one).backgroundColor === 'rgba(0, 0, 0, 0)') one = one.parentElement;"
            " return getComputedStyle(one).backgroundColor }"
        )
        for where in (".attention", "body")
    )
    assert card == page
    turned = tab.locator(".attention canvas").first.evaluate("one => getComputedStyle(one).filter")
    assert (turned != "none") == (scheme == "dark")


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
    tab.set_viewport_size(VIEWPORT)
    tab.wait_for_timeout(300)
