"""What a reader does with a page, in Chromium. Run by suites/report/test_browser.py."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from report.browser import example_runs
from report.browser.visiting import (
    LOADED,
    PHONE,
    Open,
    address,
    copied,
    focused,
    link,
    settle,
    shown,
)

# --- what stands where --------------------------------------------------------------------------


def test_the_answer_comes_first_and_then_what_is_unexpected(visit: Open) -> None:
    tab = visit("everything")
    assert tab.title().startswith("5 of 14 checks came out unexpectedly")
    heads = tab.locator("main h1, main h2").all_inner_texts()
    assert [head.split(" ")[0].split("\n")[0] for head in heads[:6]] == [
        *("5", "Unexpected", "Defects", "Functions", "Checks", "Environment"),
    ]
    verdicts = shown(tab, "#unexpected-checks > details > summary .verdict")
    assert verdicts == ["crash", "timeout", "error", "fail", "xpass"]


def test_a_hang_shows_its_ranks_side_by_side(visit: Open) -> None:
    tab = visit("everything", link("hanging"))
    check = tab.locator("#all-checks details[open]")
    assert example_runs.HANG in check.locator(".told").inner_text()
    first, second = check.locator(".rank").all()
    assert "all_gather #7" in first.inner_text()
    assert "waits in all_gather" in first.inner_text()
    assert "The same stack as rank 0's." in second.inner_text()
    assert "node1" in second.inner_text()
    assert first.bounding_box()["y"] == second.bounding_box()["y"]
    assert "line 5," not in first.inner_text()
    first.locator(".earlier summary").click()
    assert "line 5," in first.inner_text()


def test_texts_are_texts(visit: Open) -> None:
    tab = visit("everything", link("hostile"))
    check = tab.locator("#all-checks details[open]")
    assert check.locator(".told pre").first.inner_text() == example_runs.HOSTILE
    assert tab.locator("main img").count() == 0
    assert "taken" not in tab.title()


def test_a_defect_unfolds_to_all_that_is_known(visit: Open) -> None:
    tab = visit("everything")
    tab.locator("#SP-001 > summary").click()
    told = tab.locator("#SP-001 .body").inner_text()
    for title in ("What happens", "Whom it hits", "Workaround", "Mended by", "Cause", "Upstream"):
        assert title in told
    expect(tab.locator("#SP-001 .checks > details")).to_have_count(1)
    tab.locator("#SP-001 .script > summary").click()
    assert "torchrun" in tab.locator("#SP-001 .script").inner_text()
    assert "not in this catalogue" in tab.locator("#SP-999").inner_text()


def test_a_cell_opens_its_checks(visit: Open) -> None:
    tab = visit("everything")
    cell = tab.locator("tr[data-name$=_gather_state_dict] .cell[data-law=symmetry]")
    assert cell.inner_text() == "0/1"
    cell.click()
    assert cell.get_attribute("aria-expanded") == "true"
    assert shown(tab, ".under .verdict") == ["timeout"]
    cell.click()
    assert not shown(tab, ".under")


def test_benchmarks_stand_on_one_axis(visit: Open) -> None:
    tab = visit("measured")
    expect(tab.locator("#side-by-side svg")).to_have_count(1)
    expect(tab.locator("#over-ranks svg")).to_have_count(4)
    tab.locator("#numbers-of > summary").click()
    row = tab.locator("#numbers tr", has_text="_gather_state_dict, many, 4 ranks").inner_text()
    assert "2000 / 2" in row
    assert "s" in row


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("reference", "shardproof on torch 2.13.0 on Gloo: all 30 checks hold"),
        ("empty", "Nothing was judged"),
        ("interrupted", "The run is incomplete: 38 of 40 checks did not run"),
    ],
)
def test_other_runs(visit: Open, name: str, sentence: str) -> None:
    tab = visit(name)
    assert tab.locator("h1").text_content() == sentence
    assert not shown(tab, "#unexpected")
    assert not shown(tab, "#benchmarks")


# --- filter, search, addresses ------------------------------------------------------------------


def matching(tab: Any, text: str) -> None:
    tab.wait_for_function(
        "text => document.getElementById('matching').textContent === text", arg=text
    )


@pytest.mark.parametrize(
    ("select", "word", "left"),
    [
        ("function", "tensor.parallel.ddp._localize_dtensor", 2),
        ("law", "cost", 1),
        ("verdict", "xfail", 5),
        ("severity", "corrupts", 2),
        ("level", "SHOULD", 1),
        ("road", "model-get-full", 4),
    ],
)
def test_the_filter(visit: Open, select: str, word: str, left: int) -> None:
    """It leaves the same checks in every part of the page, and stands in its address."""
    tab = visit("everything")
    tab.locator(f"select[name={select}]").select_option(word)
    matching(tab, f"{left} of 15 checks")
    assert len(shown(tab, "#all-checks > details")) == left
    assert f"{select}={word}" in tab.url
    tab.reload()
    matching(tab, f"{left} of 15 checks")
    tab.locator("#clear").click()
    matching(tab, "15 checks")


def test_the_filter_reaches_defects_and_matrix(visit: Open) -> None:
    tab = visit("everything")
    tab.locator("select[name=law]").select_option("structure")
    matching(tab, "1 of 15 checks")
    assert [text.split("\n")[0] for text in shown(tab, "details.defect > summary")] == ["SP-002"]
    assert not shown(tab, "#unexpected")
    assert shown(tab, "button.cell:enabled") == ["0/1"]


def test_search_finds_words_of_messages_and_stacks(visit: Open) -> None:
    tab = visit("everything")
    tab.keyboard.press("/")
    tab.keyboard.type("never issued f39")
    matching(tab, "1 of 15 checks")
    assert shown(tab, "#all-checks .verdict") == ["timeout"]
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    matching(tab, "15 checks")


def test_links_lead_back(visit: Open) -> None:
    """To a check, a defect and a cell; also after a reload, and from elsewhere on the page."""
    tab = visit("everything", link("dying"))
    tab.locator("#all-checks details[open] button[data-link]").click()
    copied(tab, address(tab))
    tab.reload()
    assert shown(tab, "#all-checks details[open] > summary .verdict") == ["crash"]
    page = address(tab).partition("#")[0]
    tab.goto(page + "#SP-002")
    expect(tab.locator("#SP-002")).to_have_attribute("open", "")
    tab.reload()
    expect(tab.locator("#SP-002")).to_have_attribute("open", "")
    tab.goto(page + "#cell=" + quote("_state_dict_utils._gather_state_dict/cost", safe=""))
    expect(tab.locator(".under .verdict")).to_have_text(["xfail"])


def test_a_link_to_a_check_that_the_filter_hides_shows_it(visit: Open) -> None:
    tab = visit("everything", link("dying") + "&verdict=pass")
    assert shown(tab, "#all-checks details[open] > summary .verdict") == ["crash"]


def test_an_address_of_another_run_is_told(visit: Open) -> None:
    tab = visit("reference", "#SP-002")
    assert tab.locator("#said").inner_text() == "This run has no SP-002"
    tab = visit("reference", "#verdict=crash&function=%E0%A4%A")
    matching(tab, "30 checks")


def test_copying_gives_the_command(visit: Open) -> None:
    tab = visit("everything", link("dying"))
    tab.wait_for_function("document.activeElement.matches('summary')")
    tab.keyboard.press("c")
    expect(tab.locator("#said")).to_have_text("Copied")
    copied(tab, example_runs.check("dying")["command"])
    tab.locator(".answer .copy").click()
    copied(tab, "ci/conformance --subject torch.distributed")


# --- the keyboard -------------------------------------------------------------------------------


def test_the_keyboard_goes_through_entries(visit: Open) -> None:
    tab = visit("everything", "#checks")
    tab.keyboard.press("j")
    first = focused(tab)
    tab.keyboard.press("j")
    assert focused(tab) != first
    tab.keyboard.press("k")
    assert focused(tab) == first
    tab.keyboard.press("Enter")
    opened = "document.activeElement.parentElement.open"
    tab.wait_for_function(opened)
    tab.keyboard.press("Escape")
    tab.wait_for_function(f"!{opened}")
    tab.keyboard.press("l")
    assert "#check=" in address(tab)
    copied(tab, address(tab))


def test_arrows_go_through_the_matrix(visit: Open) -> None:
    tab = visit("everything")
    tab.locator("tr[data-name$=_gather_state_dict] .cell").first.focus()
    law = "document.activeElement.dataset.law"
    assert tab.evaluate(law) == "values"
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate(law) == "symmetry"
    tab.keyboard.press("Enter")
    expect(tab.locator(".under .verdict")).to_have_text(["timeout"])
    tab.keyboard.press("Escape")
    expect(tab.locator(".under")).to_have_count(0)


def test_help(visit: Open) -> None:
    tab = visit("everything")
    tab.keyboard.press("?")
    assert "search" in tab.locator("#help").inner_text()
    tab.keyboard.press("Escape")
    expect(tab.locator("#help")).to_be_hidden()


# --- themes, print, a phone, time ---------------------------------------------------------------


def paper(tab: Any) -> str:
    return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_both_themes(visit: Open) -> None:
    """As the system has it, and as the reader chooses, which a reload keeps."""
    light, dark = (visit("everything", color_scheme=scheme) for scheme in ("light", "dark"))
    white, black = paper(light), paper(dark)
    assert white != black
    for _ in range(2):
        light.locator("#theme").click()
    assert paper(light) == black
    light.reload()
    assert paper(light) == black
    assert light.locator("#theme").get_attribute("aria-label") == "Theme: dark"


@pytest.mark.parametrize("name", ["everything", "comparison"])
def test_print(visit: Open, name: str) -> None:
    """On paper stands what is told, and no button; unexpected verdicts in full."""
    tab = visit(name, color_scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not shown(tab, ".top, .filter, .copy, [data-link]")
    assert tab.locator("#unexpected-checks > details:not([open])").count() == 0
    assert tab.pdf()[:4] == b"%PDF"


def test_of_all_checks_those_are_printed_that_were_asked_for(visit: Open) -> None:
    tab = visit("everything")
    tab.emulate_media(media="print")
    assert not shown(tab, "#checks")
    tab.goto(tab.url + "#verdict=pass")
    matching(tab, "4 of 15 checks")
    assert len(shown(tab, "#all-checks > details")) == 4
    tab = visit("everything", link("dying"))
    tab.emulate_media(media="print")
    assert shown(tab, "#all-checks details[open]")


@pytest.mark.parametrize("name", ["everything", "measured", "comparison"])
def test_a_phone(visit: Open, name: str) -> None:
    """Nothing is wider than the screen but what scrolls itself."""
    tab = visit(name, viewport=PHONE, has_touch=True, is_mobile=True)
    for one in tab.locator("main details:not(.selects)").all()[:12]:
        one.evaluate("one => { one.open = true; }")
    settle(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    if name == "everything":
        assert not shown(tab, "select[name=law]")
        tab.locator("#selects > summary").click()
        assert len(shown(tab, "select[name=law]")) == 1


def test_three_thousand_checks_load_at_once(visit: Open) -> None:
    tab = visit("reference")
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(float(one["value"]) for one in metrics if one["name"] == "TaskDuration")

    began = spent()
    tab.goto(tab.url.replace("/reference/", "/large/"))
    assert tab.locator("#all-checks > details").count() == 100
    assert 0 < spent() - began < LOADED
    began = spent()
    tab.locator("select[name=verdict]").select_option("pass")
    matching(tab, "1500 of 3000 checks")
    assert spent() - began < LOADED
    tab.locator("#all-checks > button").click()
    assert tab.locator("#all-checks > details").count() == 200
    last = example_runs.large()["checks"][-2]["id"]
    tab.goto(tab.url.partition("#")[0] + "#check=" + quote(last, safe=""))
    opened = tab.locator("#all-checks > details[open]")
    assert opened.get_attribute("data-check") == last
    tab.wait_for_function("document.activeElement.matches('summary')")
    assert opened.bounding_box()["y"] < 400


# --- the comparison -----------------------------------------------------------------------------


def test_a_comparison_tells_what_changed(visit: Open) -> None:
    tab = visit("comparison")
    assert tab.locator("h1").text_content().startswith("Something got worse: 1 new defect")
    tab.locator("#SP-002 > summary").click()
    tab.locator("#SP-002 details.pair > summary").click()
    expect(tab.locator("#SP-002 .pair-body .told")).to_have_count(2)
    before, now = tab.locator("#SP-002 .pair-body > section").all()
    assert "out/before" in before.inner_text()
    assert "pass" in before.inner_text()
    assert "xfail" in now.inner_text()
    assert "holds → fails" in tab.locator("#new").inner_text()
    assert "40" in tab.locator("#slower").inner_text()
    assert shown(tab, "tr.differs th") == ["torch", "Verdicts"]
    tab = visit("comparison", "#SP-002")
    expect(tab.locator("#SP-002")).to_have_attribute("open", "")


# --- whom it keeps out --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["everything", "measured", "comparison"])
def test_accessibility(visit: Open, name: str, scheme: str) -> None:
    """axe-core finds nothing serious, with much of the page unfolded."""
    tab = visit(name, color_scheme=scheme)
    for selector in ("#SP-001", "#SP-001 .check", "#unexpected .check", ".pair", "#numbers-of"):
        for one in tab.locator(selector).all()[:3]:
            one.evaluate("one => { one.open = true; }")
        settle(tab)
    if name == "everything":
        tab.locator("button.cell:enabled").first.click()
    found = Axe().run(tab).response["violations"]
    bad = [
        (one["id"], one["nodes"][0]["html"][:200])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not bad
