"""A report in a real Chromium: what it draws, that it asks for nothing, on a phone, in the dark, by keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import chromium
import PIL.Image
import pytest
import runs

from dspref.report import page
from dspref.run import history

pytestmark = pytest.mark.skipif(not chromium.found(), reason="no Chromium is installed: apt-get install chromium")

HOSTILE = "</script><img src='http://127.0.0.1:9/x' onerror='window.hit=1'><script>window.hit=1</script>"


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    with chromium.page() as opened:
        yield opened


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A report on a long run, one that was cut off with bad lines and gaps, and a short one with hostile text."""
    folder = tmp_path_factory.mktemp("several")
    paths = [runs.write(folder / "long", steps=10_000), runs.write(folder / "cut", steps=300, seed=1, rate=1e-3)]
    with open(paths[1] / "metrics.jsonl", "a") as file:
        file.write(
            runs.lines([{"step": n, "loss": None if n in (302, 303) else 0.25} for n in range(301, 310)]) + '{"step": 31'
        )
    paths.append(runs.write(folder / "short", steps=20, seed=2))
    (paths[2] / "samples.jsonl").write_text(
        runs.lines(
            [
                {"prompt": HOSTILE, "policy": HOSTILE, "reference": "no", "chosen": "y"}
                | {"images": ["red.png", HOSTILE], "image_folder": str(folder)}
            ]
        )
    )
    PIL.Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    (paths[2] / "logs/rank-0.log").write_text(f"warning: {HOSTILE}\n")
    (folder / "report.html").write_text(page.render(history.read_all(paths)), encoding="utf-8")
    return folder / "report.html", paths


@pytest.fixture
def opened(tab: chromium.Page, several: tuple[Path, list[Path]]) -> chromium.Page:
    tab.resize(1280, 900)
    tab.messages.clear()
    tab.requests.clear()
    tab.open(several[0])
    return tab


def drawn(tab: chromium.Page, chart: str) -> list[list[float | None]]:
    """The steps and the values of each curve, as they are on the canvas; None for a gap, "" where it has no such step."""
    return tab.evaluate(
        f"window.dspref.plots[{json.dumps(chart)}].data.map((c) => Array.from(c, (v) => (v === undefined ? '' : v)))"
    )


def test_nothing_is_asked_for_and_nothing_goes_wrong(opened, several):
    assert opened.messages == []
    assert [address for address in opened.requests if not address.startswith("data:")] == [several[0].as_uri()]
    assert opened.evaluate("window.hit") is None
    assert opened.evaluate("performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length") == 0


def test_images_of_prompts_are_drawn_from_within_the_page(opened):
    images = "Array.from(document.querySelectorAll('.sample img'), (e) => [e.alt, e.naturalWidth, e.naturalHeight])"
    assert opened.evaluate(images) == [["red.png", 30, 20]]


def test_the_page_refuses_what_is_not_its_own(opened):
    """The policy holds: a script, a style, an image and a request that somebody brought in are not let through."""
    opened.evaluate("""new Promise((done) => {
        const script = document.createElement('script'); script.textContent = 'window.hit = 1'; document.body.append(script);
        const image = new Image(); image.onerror = done; image.src = 'http://127.0.0.1:9/x.png';
    })""")
    assert opened.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert opened.evaluate("window.hit") is None
    assert len([said for said in opened.messages if "Content Security Policy" in said]) >= 3


def test_charts_have_the_values_of_the_runs(opened, several):
    columns = drawn(opened, "loss")
    assert columns[0] == sorted(columns[0])
    told = opened.evaluate("window.dspref.data.charts.find((c) => c.id === 'loss').curves.map((c) => [c.run, c.key])")
    assert told == [[run, key] for run in range(3) for key in ("loss", "eval_loss")]
    for (run, key), column in zip(told, columns[1:]):
        records = [
            json.loads(line) for line in (several[1][run] / "metrics.jsonl").read_text().splitlines() if line[-1] == "}"
        ]
        given = {record["step"]: record[key] for record in records if key in record}
        at = {step: value for step, value in zip(columns[0], column) if value != ""}
        assert all(value == pytest.approx(given[step], rel=1e-5) for step, value in at.items() if value is not None)
        finite = [value for value in given.values() if value is not None]
        shown = [value for value in at.values() if value is not None]
        assert (min(shown), max(shown)) == pytest.approx((min(finite), max(finite)), rel=1e-5), "extremes are kept"
        assert min(given) in at and max(given) in at
        assert {step for step, value in at.items() if value is None} == {step for step, v in given.items() if v is None}
    assert len(columns[0]) < 2000 < 10_000
    spikes = drawn(opened, "grad-norm")[1]
    assert max(value for value in spikes if value not in ("", None)) > 40


def test_parts_of_a_step_stand_one_upon_the_other(opened):
    steps, *parts = drawn(opened, "phases-2")
    assert len(steps) == 20 and all(low <= high for below, above in pairwise(parts) for low, high in zip(below, above))
    seconds = opened.evaluate("window.dspref.data.charts.find((c) => c.id === 'seconds').curves[2].y")
    assert parts[-1] == pytest.approx(seconds, rel=1e-4)


def test_smoothing_hiding_a_run_and_a_logarithmic_axis(opened):
    count = len(drawn(opened, "loss"))
    opened.evaluate("document.getElementById('smooth').click()")
    columns = drawn(opened, "loss")
    assert len(columns) == count + 3, "three curves of training are smoothed; evaluations are not"
    smooth, raw = ([v for v in columns[k] if v not in ("", None)] for k in (count, 1))
    assert max(smooth) < max(raw) and min(smooth) > min(raw)
    opened.evaluate("document.querySelector('[data-run=\"0\"]').click()")
    assert opened.evaluate("window.dspref.plots.loss.series.map((s) => s.show)")[1:4] == [False, False, True]
    assert opened.evaluate("window.dspref.plots['learning-rate'].scales.y.distr") == 3, "rates are far apart"
    opened.evaluate("document.querySelector('[data-log=\"learning-rate\"]').click()")
    assert opened.evaluate("window.dspref.plots['learning-rate'].scales.y.distr") == 1
    assert opened.messages == []


def test_the_keyboard_moves_along_a_chart_and_what_is_there_is_said(opened):
    opened.evaluate("document.querySelector('[data-chart=loss]').focus()")
    for key in ("Home", "ArrowRight", "End", "ArrowLeft", "ArrowLeft"):
        opened.press(key)
    steps = drawn(opened, "loss")[0]
    said = opened.evaluate("document.querySelector('p[role=status]').textContent")
    assert said.startswith(f"step {int(steps[-3]):,}: long training 0.") and "cut training 0.25" in said
    assert opened.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Loss by step. long, training: ")
    opened.evaluate("document.querySelector('[data-chart=loss] ~ details').open = true")
    cells = opened.evaluate(
        "[...document.querySelectorAll('[data-chart=loss] ~ details tbody tr:last-child > *')].map((c) => c.textContent)"
    )
    assert cells[0] == "10,000" and len(cells) == 7


# Words of the evaluations that go on in a second line.
BROKEN = """
[...document.querySelectorAll('#evaluations td')].flatMap((cell) => {
  const text = cell.firstChild
  return text ? [...text.data.matchAll(/\\S+/g)].filter((word) => {
    const range = document.createRange()
    range.setStart(text, word.index)
    range.setEnd(text, word.index + word[0].length)
    return range.getClientRects().length > 1
  }).map((word) => word[0]) : []
})"""


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen_in_light_and_dark(width, dark, opened):
    opened.resize(width, 844, dark)
    assert not opened.evaluate("'other-0' in window.dspref.plots"), "what is closed is not drawn yet"
    opened.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    opened.evaluate("new Promise((done) => setTimeout(done, 60))")
    assert opened.evaluate("window.dspref.data.charts.every((chart) => chart.id in window.dspref.plots)")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("[...document.querySelectorAll('figure')].every((f) => f.scrollWidth <= f.clientWidth + 1)")
    assert opened.evaluate(BROKEN) == [], "figures are whole"
    ground, ink = opened.evaluate(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    assert (sum(map(int, ground[4:-1].split(","))) < sum(map(int, ink[4:-1].split(",")))) is dark
    colour = opened.evaluate("window.dspref.plots.loss.series[1]._stroke ?? window.dspref.plots.loss.series[1].stroke()")
    assert colour == ("#56b4e9" if dark else "#0072b2")
    assert opened.messages == []
