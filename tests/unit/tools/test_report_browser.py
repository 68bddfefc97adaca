"""The page of a report as a browser shows it: offline, on a desk and on a phone, in the light and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from moe_scale.tools.report import write
from moe_scale.tools.report_data import open_runs
from tests.unit.tools.report_runs import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium or google-chrome on PATH: as root, apt-get install chromium"
)

DESK, PHONE = (1280, 900), (360, 740)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, long enough that its lines are drawn as means; and one of two runs with long names."""
    folder = tmp_path_factory.mktemp("report")
    one = write_run(folder / "one", steps=700, layers=3, experts=8, evaluate_every=70)
    long = {"data": {"source": "/a/folder/with/a/name/that/is/longer/than/a/phone/is/wide/" + "x" * 80}}
    two = write_run(folder / ("a-run-whose-name-is-long-" + "y" * 40), settings=long, seed=1, finished=False)
    now = datetime(2026, 1, 2, 4, 0, tzinfo=UTC)
    return {
        "one": write(open_runs([str(one)]), folder / "report-one", now),
        "two": write(open_runs([str(one), str(two)]), folder / "report-two", now),
    }


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, page: Page, path: Path):
        self.page, self.path = page, path
        self.said: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.as_uri())

    def get(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    contexts = []

    def open_page(path: Path, size: tuple[int, int] = DESK, scheme: Any = "light", **options: Any) -> Opened:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True, **options
        )
        contexts.append(context)
        return Opened(context.new_page(), path)

    yield open_page
    for context in contexts:
        context.close()


LUMINANCE = """(() => {
  const [r, g, b] = getComputedStyle(%s).%s.match(/[0-9.]+/g).map(Number);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
})()"""


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_by_itself_and_fits(
    which: str, size: tuple[int, int], scheme: str, pages: dict[str, Path], open_page: Any
) -> None:
    opened = open_page(pages[which], size, scheme)
    assert opened.said == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [pages[which].as_uri()]
    assert opened.get("document.documentElement.scrollWidth") <= size[0]
    # Nothing sticks out of the window but what scrolls in a frame of its own.
    assert (
        opened.get(
            """[...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll") && e.closest("svg") === null
            && e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"""
        )
        == []
    )
    page, ink = (opened.get(LUMINANCE % ("document.body", of)) for of in ("backgroundColor", "color"))
    assert (page < 0.15 and ink > 0.8) if scheme == "dark" else (page > 0.9 and ink < 0.2)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_every_chart_has_lines_and_every_map_a_picture(
    size: tuple[int, int], pages: dict[str, Path], open_page: Any
) -> None:
    opened = open_page(pages["one"], size)
    charts = opened.get(
        """[...document.querySelectorAll(".chart")].map((chart) => {
            const shown = [...chart.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 0);
            const lines = shown.flatMap((svg) => [...svg.querySelectorAll("g[id*=line2d] > path")]);
            const coloured = lines.filter((path) => path.getAttribute("style")?.includes("var(--c"));
            return {
                title: chart.querySelector("b").textContent,
                shown: shown.length,
                width: shown[0].getBoundingClientRect().width,
                lengths: coloured.map((path) => path.getTotalLength()),
                strokes: coloured.map((path) => getComputedStyle(path).stroke),
                labels: chart.querySelectorAll(".legend span > output").length,
            };
        })"""
    )
    assert len(charts) >= 12
    for chart in charts:
        assert chart["shown"] == 1, chart  # the wide or the narrow one
        assert chart["width"] > min(300, size[0] - 60), chart
        assert len(chart["lengths"]) == chart["labels"], chart
        assert min(chart["lengths"]) > 100, chart
        assert len(set(chart["strokes"])) == chart["labels"], chart
    maps = opened.get(
        "[...document.querySelectorAll('.map img')].map((i) => [i.naturalWidth, i.naturalHeight, i.width, i.height])"
    )
    assert len(maps) == 3 + 7
    assert all(columns >= 10 and rows in (3, 8) for columns, rows, *_ in maps)
    assert all(width > 100 and height > 60 for *_, width, height in maps)


def test_text_on_a_phone_can_be_read(pages: dict[str, Path], open_page: Any) -> None:
    opened = open_page(pages["one"], PHONE)
    heights = opened.get(
        """[...document.querySelectorAll(".picture svg text")].filter((t) => t.getBoundingClientRect().width > 0)
        .map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getCTM().d)"""
    )
    assert len(heights) > 50
    assert min(heights) > 9
    outside = opened.get(
        """[...document.querySelectorAll(".picture svg text")].filter((t) => {
            const box = t.getBoundingClientRect(), card = t.closest(".card").getBoundingClientRect();
            return box.width > 0 && (box.left < card.left || box.right > card.right);
        }).map((t) => t.textContent)"""
    )
    assert outside == []


def test_maps_are_drawn_for_the_dark(pages: dict[str, Path], open_page: Any) -> None:
    light, dark = (open_page(pages["one"], DESK, scheme) for scheme in ("light", "dark"))
    script = "[...document.querySelectorAll('.map img')].map((image) => image.currentSrc)"
    assert all(one != other for one, other in zip(light.get(script), dark.get(script), strict=True))


def test_the_pointer_shows_values(pages: dict[str, Path], open_page: Any) -> None:
    opened = open_page(pages["one"])
    chart = opened.page.locator(".chart.hero")
    before = chart.locator(".legend").inner_text()
    assert "last" in before
    picture = chart.locator(".picture.wide")
    box = picture.bounding_box()
    assert box
    left, right = (float(picture.get_attribute(f"data-{side}") or 0) for side in ("left", "right"))
    low, high = opened.get("JSON.parse(document.getElementById('data').textContent).c0.limits")
    step = 280  # an evaluation
    share = left + (step - low) / (high - low) * (right - left)
    opened.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
    shown = chart.locator(".legend").inner_text()
    assert f"step {step}" in shown or f"step {step - 1}" in shown or f"step {step + 1}" in shown
    values = opened.get("JSON.parse(document.getElementById('data').textContent).c0.lines[1]")
    held_out = values["y"][values["x"].index(step)]
    assert f"{held_out:.3f}".rstrip("0") in shown
    opened.page.mouse.move(5, 5)
    assert chart.locator(".legend").inner_text() == before

    map = opened.page.locator(".map[data-key]").first
    map.scroll_into_view_if_needed()
    box = map.locator("img").bounding_box()
    assert box
    opened.page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 4.5 / 8 * box["height"])
    values = opened.get(
        "Object.values(JSON.parse(document.getElementById('data').textContent)).find((d) => d.rows).values"
    )
    assert f"expert 4: {values[-1][4]}" in map.locator(".steps output").inner_text()
    assert opened.said == []


def test_without_scripts_all_is_there_but_the_values_under_the_pointer(pages: dict[str, Path], open_page: Any) -> None:
    opened = open_page(pages["one"], java_script_enabled=False)
    page = opened.page
    assert page.locator(".chart svg:visible").count() >= 12
    assert page.locator(".map img:visible").count() == 10
    assert page.locator(".events tbody tr").count() == 5
