"""The feature dashboard: what stands in the file, and what it does in a real browser."""

import dataclasses
import importlib.util
import os
import re
import shutil

import numpy as np
import pytest
import torch

from mechinterp import Prompts, Site
from mechinterp.reporting.features import features_page, payload, share, short, write_features
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.features.describe import Features, describe
from mechinterp.text import Blocks
from tests.families import model
from tests.sae.tiny import tiny_sae

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '</script><script>alert(1)</script><b onclick="alert(2)">'
VIEWPORT = {"width": 1240, "height": 1000}
DEAD = 39


def described(site=None, features=range(40), d_sae=40, n=40, length=24):
    """Features of a tiny model whose tokens have awkward texts: markup, newlines, blanks, nothing."""
    of = model("llama")
    draw = torch.Generator().manual_seed(0)
    rows = (torch.rand(n, length, generator=draw) ** 2 * 61).long()
    blocks = Blocks(Prompts(rows), torch.arange(n) * 9 // n, "random <tokens>")
    sae = tiny_sae(of, site or Site("resid_post", 1), d_sae=d_sae, exclusion=Exclusion(tokens=(5,)))
    with torch.no_grad():
        sae.b_enc[DEAD] = -1e4
    found = describe(of, sae, blocks, features)
    odd = {0: HOSTILE, 1: "\n", 2: " the", 3: "", 4: "<b>", 6: "\x07", 7: " "}
    vocabulary = {key: odd.get(int(key), f"w{key}") for key in found.about["vocabulary"]}
    return dataclasses.replace(found, about={**found.about, "vocabulary": vocabulary})


@pytest.fixture(scope="module")
def features():
    return described()


@pytest.fixture(scope="module")
def page(features, tmp_path_factory):
    return write_features(features, tmp_path_factory.mktemp("page") / "features.html", "mechinterp sae features <RUN>")


def test_the_page_is_one_file_and_asks_for_nothing(page):
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)=["']?(?:https?:|//)""", text)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|@import|url\(", text)


def test_hostile_text_opens_no_tag(page):
    text = page.read_text()
    assert "<script>alert" not in text and "<b onclick" not in text and "</script><script>" not in text
    assert text.count("<script") == 3 and "random &lt;tokens&gt;" in text and "&lt;RUN&gt;" in text


def test_the_list_holds_every_feature(page, features):
    rows = re.findall(r'<tr data-feature="(\d+)"', page.read_text())
    assert [int(number) for number in rows] == features.data["feature"].values.tolist()


def test_the_payload_says_what_the_result_says(features):
    made = payload(features)
    one, row = features.one(4), next(one for one in made["features"] if one["feature"] == 4)
    peak, document, position, middle, tokens, values, band = row["contexts"][0]
    first = one["contexts"][0]
    assert peak == pytest.approx(first["peak"], rel=1e-2) and (document, position) == (
        first["document"],
        first["position"],
    )
    assert [made["words"][token] for token in tokens] == first["tokens"] and band is None
    assert values[middle] == peak and middle == first["at"]
    assert [value is None for value in values] == [value is None for value in first["activations"]]
    assert {example[6] for example in row["examples"]} == {0, 1, 2, 3}
    assert [made["words"][token] for token, _ in row["promoted"]] == [each["token"] for each in one["promoted"]]


def test_a_page_from_a_saved_result_is_the_same(features, page, tmp_path):
    features.save(tmp_path / "features.safetensors")
    again = features_page(Features.load(tmp_path / "features.safetensors"), "mechinterp sae features <RUN>")
    assert again == page.read_text()


def test_two_hundred_features_are_small(tmp_path):
    many = described(features=200, d_sae=400, n=60, length=32)
    assert many.data.sizes["feature"] == 200
    assert write_features(many, tmp_path / "many.html").stat().st_size < 4_000_000


def test_what_is_missing_is_said():
    text = features_page(described(Site("mlp_post", 1), [3, DEAD]))
    assert "mlp_post is not added to the residual stream" in text and "promotes</th>" not in text
    assert "never on" in text and "Run it again" not in text


def test_another_model_is_named(features):
    other = dataclasses.replace(features, about={**features.about, "trained_for": "someone/gpt2"})
    assert "trained on someone/gpt2, and is looked at on llama" in features_page(other)
    assert "is looked at on llama" not in features_page(features)


def test_numbers_as_text():
    assert [share(one) for one in (0.5, 0.0123, 0.0, None, np.nan)] == ["50%", "1.2%", "0%", "undefined", "undefined"]
    assert [short(one) for one in (1234.5, 12.345, -0.5, None)] == ["1,234", "12.3", "\u22120.5", "undefined"]


# In a browser


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

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, page, request):
    """A fresh tab on the page (at an address, if a test asks for one). After: no request and no error."""
    context = browser.new_context(color_scheme=getattr(request, "param", "light"), viewport=VIEWPORT)
    tab, requests, errors = context.new_page(), [], []
    tab.on("request", lambda item: requests.append(item.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("dialog", lambda dialog: (errors.append(f"a dialog opened: {dialog.message}"), dialog.dismiss()))
    tab.goto(page.as_uri())
    yield tab
    assert {url.split("#")[0] for url in requests if not url.startswith("data:")} == {page.as_uri()}
    assert errors == []
    context.close()


both_schemes = pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)


def heading(tab):
    return tab.locator("#panel h2").inner_text().split("\n")[0]


@both_schemes
def test_the_first_feature_is_open_and_links_open_others(tab, page):
    assert heading(tab) == "Feature 0"
    tab.goto(f"{page.as_uri()}#feature-17")
    assert heading(tab) == "Feature 17"
    assert tab.locator("tr[aria-current]").get_attribute("data-feature") == "17"
    link = tab.locator("#panel .near a").first
    number = link.get_attribute("href")
    link.click()
    tab.wait_for_function(f"location.hash === '{number}'")
    assert heading(tab) == f"Feature {number.removeprefix('#feature-')}"
    tab.go_back()
    tab.wait_for_function("location.hash === '#feature-17'")
    assert heading(tab) == "Feature 17"
    tab.goto(f"{page.as_uri()}#feature-999")  # none: the page stays as it is
    assert heading(tab) == "Feature 17"


def test_search_and_sort(tab):
    rows = tab.locator("#features tbody tr:visible")
    tab.get_by_role("searchbox").fill("w60")
    assert 0 < rows.count() < 40 and f"{rows.count()} of 40 features" in tab.locator("#found").inner_text()
    tab.get_by_role("searchbox").fill("no such token")
    assert rows.count() == 0 and tab.locator(".none").is_visible()
    tab.get_by_role("searchbox").fill("")
    tab.get_by_role("button", name="density").click()
    densities = "all => all.map((row) => Number(row.cells[1].dataset.value))"
    shares = tab.eval_on_selector_all("#features tbody tr", densities)
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] == 0


def test_the_keyboard_goes_through_list_and_text(tab):
    tab.locator(".scroll.list").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert heading(tab) == "Feature 2" and tab.evaluate("location.hash") == "#feature-2"
    tab.keyboard.press("ArrowUp")
    assert heading(tab) == "Feature 1"
    tab.locator(".stretch p").first.focus()
    tab.keyboard.press("ArrowRight")
    peak = tab.locator(".stretch .of b").first.inner_text()
    assert f"activation {peak}" in tab.locator("#tip").inner_text()
    at = int(re.search(r"position (\d+)", tab.locator("#tip").inner_text())[1])
    tab.keyboard.press("ArrowLeft")
    assert f"position {at - 1}" in tab.locator("#tip").inner_text()


@both_schemes
def test_pointing_at_a_token_shows_its_activation(tab):
    piece = tab.locator(".stretch .t.peak").nth(1)
    piece.scroll_into_view_if_needed()
    tab.wait_for_timeout(100)
    piece.hover()
    assert re.search(r"activation [\d.]+ · position \d+", tab.locator("#tip").inner_text())
    colour = "one => getComputedStyle(one).backgroundColor"
    quiet = tab.locator(".stretch .t[data-value='0']").first
    assert piece.evaluate(colour) != quiet.evaluate(colour)


def test_excluded_tokens_are_struck_out(tab, features):
    tab.goto(f"{tab.url.split('#')[0]}#feature-4")
    out = tab.locator(".t.out")
    assert out.count() > 0
    assert "line-through" in out.first.evaluate("one => getComputedStyle(one).textDecorationLine")
    peaks = tab.eval_on_selector_all(".t.peak", "all => all.map((one) => one.dataset.value)")
    assert all(float(peak) > 0 for peak in peaks)


def test_tokens_stay_text_and_blanks_are_seen(tab, page):
    assert tab.locator("script").count() == 3
    texts = set()
    for number in range(20):
        tab.goto(f"{page.as_uri()}#feature-{number}")
        texts |= set(tab.locator(".t").all_inner_texts())
    assert {HOSTILE.replace(" ", "·"), "↵", "·the", "∅", "<b>", "\\x07", "·"} <= texts
    assert tab.locator("#panel b[onclick]").count() == 0


def test_a_feature_that_is_never_on(tab, page):
    tab.goto(f"{page.as_uri()}#feature-{DEAD}")
    assert "Never on in these" in tab.locator("#panel").inner_text() and tab.locator(".stretch").count() == 0
    assert tab.locator("#panel .logits li").count() == 20


@both_schemes
def test_narrow_screens_do_not_scroll_sideways(tab):
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.wait_for_timeout(200)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_theme_can_be_changed(tab):
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.get_by_role("button", name="Dark theme").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
