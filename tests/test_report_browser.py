"""The report in a headless Chromium: the slider, the keys, the refresh under a reader's hands, both color schemes; screenshots are kept."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import report_runs
from PIL import Image

from common.store import paths
from common.store.run_store import RunStore
from deploy.report.live import LiveRun
from deploy.report.page import write_report
from tests.browser import Page, chromium
from tests.live_report import HandClock, drawn_state, served

pytestmark = pytest.mark.browser
WHERE = "document.getElementById('where').textContent"
SHOWN = "document.querySelector('#pairs [data-row] img').getAttribute('src')"
BASE = "document.querySelector('#pairs .two > div:first-child img').getAttribute('src')"


def run_of_three_versions(store: RunStore) -> None:
    """Four updates; the base, version 2 and version 4 evaluated."""
    report_runs.start(store)
    for update in (1, 2, 3, 4):
        report_runs.put_json(store, paths.metrics_path(update, 1), report_runs.metrics(update, 6))
    for version, skill in ((0, 0.0), (2, 0.0), (4, 1.0)):
        report_runs.evaluation(store, version, {"colors": [skill, 1.0], "counting": [skill, 0.0]})


def assert_not_blank(path: Path) -> None:
    """Text, cards and images make many colors; an empty page has a handful."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 200


async def check_slider(page: Page, first: str) -> None:
    """Three versions under the slider, the base always beside; `first` starts an image's address."""
    await page.wait(f"{WHERE} === 'update 4'")
    base, newest = await page.value(BASE), await page.value(SHOWN)
    assert base.startswith(first) and newest.startswith(first) and base != newest
    assert await page.value("document.querySelector('#pairs small').textContent") == "base"
    await page.value("document.getElementById('controls').scrollIntoView()")
    await page.press("ArrowLeft")
    await page.wait(f"{WHERE} === 'update 2'")
    assert await page.value(BASE) == base and await page.value(SHOWN) != newest
    assert await page.value("location.hash") == "#update=2"
    await page.press("ArrowLeft")
    await page.press("ArrowLeft")  # the base is the end
    await page.wait(f"{WHERE} === 'base'")
    assert await page.value(SHOWN) == base
    await page.value("(() => { const s = document.getElementById('slider'); s.value = 2; s.dispatchEvent(new Event('input')); })()")
    await page.wait(f"{WHERE} === 'update 4'")
    assert await page.value(SHOWN) == newest
    images = "Array.from(document.querySelectorAll('#pairs img'))"
    await page.wait(f"{images}.every((image) => image.complete && image.naturalWidth === 64)")


async def read_while_it_goes_on(url: str, store: RunStore, clock: HandClock, folder: Path) -> list[str]:
    """Open the live page, read, let an update and an evaluation come; return what the browser complained about."""
    async with chromium(folder / "profile") as page:
        await page.look_like(width=1280)
        await page.open(url)
        await check_slider(page, "/samples/")
        await page.value("document.getElementById('all').open = true")
        await page.press("ArrowLeft")
        await page.wait("document.getElementById('now').textContent.includes('update 4 of 60')")
        await page.value("document.querySelector('[data-part=training] h2').scrollIntoView()")
        before = await page.value("document.querySelector('[data-part=training] h2').getBoundingClientRect().top")
        old = await page.value("document.querySelector('[data-part=training]').dataset.digest")
        report_runs.put_json(store, paths.metrics_path(5, 1), report_runs.metrics(5, 6))
        report_runs.evaluation(store, 5, {"colors": [1.0, 1.0], "counting": [1.0, 1.0]})
        clock.now += 1000.0
        await page.wait(f"document.querySelector('[data-part=training]').dataset.digest !== {old!r}")
        await page.wait("document.querySelectorAll('.over th[data-column]').length === 4")
        await page.wait("document.getElementById('now').textContent.includes('update 5 of 60')")
        assert await page.value(WHERE) == "update 2"  # where the reader had put it
        assert await page.value("document.getElementById('all').open")
        moved = await page.value("document.querySelector('[data-part=training] h2').getBoundingClientRect().top") - before
        assert abs(moved) <= 2, f"the page jumped by {moved} pixels under its reader"
        await page.value("scrollTo(0, 0)")
        grounds = set()
        for width, scheme in ((1280, "light"), (1280, "dark"), (420, "light"), (420, "dark")):
            await page.look_like(width=width, scheme=scheme)
            assert_not_blank(await page.screenshot(folder / f"live-{width}-{scheme}.png"))
            assert await page.value("document.documentElement.scrollWidth <= innerWidth"), f"wider than {width} pixels"
            grounds.add((scheme, await page.value("getComputedStyle(document.body).backgroundColor")))
        assert len(grounds) == 2 and len({ground for _, ground in grounds}) == 2
        await page.open(url + "#update=2")
        await page.wait(f"{WHERE} === 'update 2'")  # an address names a version
        return page.complaints


def test_the_live_page_follows_a_run_and_keeps_its_readers_place(tmp_path: Path) -> None:
    store, clock = RunStore(str(tmp_path / "run")), HandClock()
    run_of_three_versions(store)
    live = LiveRun(store, clock=clock)
    drawn_state(live)
    with served(live) as url:
        assert asyncio.run(read_while_it_goes_on(url, store, clock, tmp_path)) == []


def test_the_page_that_is_one_file_has_the_slider_too(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    run_of_three_versions(store)
    path = write_report(store, tmp_path / "report.html")

    async def read() -> list[str]:
        async with chromium(tmp_path / "profile") as page:
            await page.look_like(width=1280)
            await page.open(path.as_uri())
            await check_slider(page, "data:image/webp;base64,")
            assert_not_blank(await page.screenshot(tmp_path / "report.png"))
            return page.complaints

    assert asyncio.run(read()) == []
