"""`dspref report` without a browser: what it takes from runs, and what it makes of them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import runs

from dspref import cli, looking
from dspref.report import charts, page, tables, written
from dspref.run import history
from dspref.run.curves import Column
from dspref.run.history import Sample

ROOT = Path(__file__).resolve().parents[3]
ASSETS = ROOT / "dspref/report/assets"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b]0;x\x07{{ 7*7 }}"


class Elements(HTMLParser):
    """Names and attributes of a page's elements, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = tag if tag in self.inside else ""
        if self._open:
            self.inside[tag].append("")

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open:
            self.inside[self._open][-1] += data


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.app(["report", *map(str, words)])
    return int(end.value.code or 0)


def read(*folders: Path) -> list[history.History]:
    return history.read_all(folders)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def test_thinning_keeps_every_extreme_and_every_gap():
    values: list[float | None] = [math.sin(n / 50) for n in range(10_000)]
    values[1234], values[7777], values[5000], values[5001] = 99.0, -99.0, None, None
    kept = charts.thinned(Column(list(range(10_000)), values))
    assert {0, 1234, 7777, 5000, 9999} <= set(kept) and kept == sorted(kept)
    assert len(kept) <= 3 * charts.STRETCHES + 2
    for k in range(charts.STRETCHES):  # against the slow and obvious: nothing in a stretch lies outside of what is kept
        inside = range(k * 10_000 // charts.STRETCHES, (k + 1) * 10_000 // charts.STRETCHES)
        told = [values[n] for n in inside if values[n] is not None]
        left = [values[n] for n in inside if n in kept and values[n] is not None]
        assert (min(told), max(told)) == (min(left), max(left))
    assert charts.thinned(Column(list(range(1200)), values[:1200])) == list(range(1200)), "a short one is left alone"


def test_smoothing_is_a_mean_of_what_came_before():
    assert charts.smoothed([3.0] * 5) == pytest.approx([3.0] * 5), "the beginning does not pull it to zero"
    half = 0.5 ** (1 / charts.half_life(3))
    assert charts.smoothed([1.0, None, 3.0]) == [1.0, None, pytest.approx((half + 3) / (half + 1))]


def test_every_chart_has_its_values_and_says_them(tmp_path):
    run = runs.write(tmp_path / "a", steps=40)
    drawn = {chart.id: chart for chart in charts.of(read(run))}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    training, held_out = drawn["loss"].curves
    assert (training.steps, training.whole.values) == (list(range(1, 41)), losses)
    assert training.values == [float(f"{loss:.6g}") for loss in losses]
    assert (held_out.label, held_out.steps) == ("held out", [10, 20, 30, 40])
    said = drawn["loss"].summary
    assert f"training: {losses[0]:.4g} at step 1, {losses[-1]:.4g} at step 40, lowest {min(losses):.4g}" in said
    assert {"accuracy", "margin", "nll", "rewards", "logps", "kl", "lengths", "grad-norm", "learning-rate"} <= set(drawn)
    assert {"tokens-per-second", "memory", "mfu", "phases-0"} <= set(drawn)
    assert [curve.label for curve in drawn["rewards"].curves] == ["chosen", "rejected"]
    others = {chart.title for chart in drawn.values() if chart.section == "Other metrics"}
    assert "loss/sigmoid" in others and "perf/tflops_per_rank" in others
    assert {key for record in records for key in record if not key.startswith("eval_")} == {
        *(curve.key for chart in drawn.values() for curve in chart.curves if not curve.held_out), "step", "epoch",
    }, "no metric is left out"  # fmt: skip


def test_phases_are_means_that_add_up(tmp_path):
    (run,) = read(runs.write(tmp_path / "a", steps=400))
    chart = charts.phases([run], 0)
    assert chart and chart.stacked and len(chart.curves[0].steps) == 134  # of 3 steps each
    seconds = run.curves.trained("perf/seconds").values
    parts = [sum(curve.values[at] or 0 for curve in chart.curves) for at in range(134)]
    assert parts[:133] == pytest.approx([sum(seconds[3 * at : 3 * at + 3]) / 3 for at in range(133)], rel=1e-5)
    assert "forward" in chart.meaning and "means of 3 logged steps" in chart.meaning


@pytest.mark.parametrize(
    ("rates", "log"), [((5e-7,), False), ((5e-7, 1e-6), False), ((5e-7, 1e-4), True)], ids=["one", "near", "far"]
)
def test_rates_that_are_far_apart_are_shown_on_a_logarithmic_axis(rates, log, tmp_path):
    found = read(*(runs.write(tmp_path / str(k), steps=40, rate=rate) for k, rate in enumerate(rates)))
    by_id = {chart.id: chart for chart in charts.of(found)}
    assert by_id["learning-rate"].log is log and by_id["loss"].log is None


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(tmp_path):
    text = page.render(read(runs.write(tmp_path / "a", steps=40)))
    elements = Elements(text)
    assert not [tag for tag, of in elements.found if "src" in of or (tag == "link" and of["href"] != "data:,")]
    assert not [of for _, of in elements.found if any(name.startswith("on") or name == "style" for name in of)]
    assert all((of["href"] or "").startswith("#") for tag, of in elements.found if tag == "a")
    policy = next(of["content"] for tag, of in elements.found if of.get("http-equiv") == "Content-Security-Policy") or ""
    data, script = elements.inside["script"]
    (style,) = elements.inside["style"]
    for name, content in (("script-src", script), ("style-src", style)):
        assert f"{name} 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "connect-src" not in policy
    assert len(json.loads(data)["charts"]) > 15


def test_labels_for_those_who_do_not_see(tmp_path):
    elements = Elements(page.render(read(*(runs.write(tmp_path / name, steps=40) for name in "ab"))))
    drawn = [of for tag, of in elements.found if "data-chart" in of]
    assert drawn and all(of["role"] == "img" and of["tabindex"] == "0" and len(of["aria-label"] or "") > 60 for of in drawn)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("h1") == tags.count("main") == 1 and tags.count("details") > len(drawn)
    assert next(of for tag, of in elements.found if tag == "html") == {"lang": "en"}
    ids = [of["id"] for _, of in elements.found if "id" in of]
    assert len(ids) == len(set(ids)), "no id comes twice"


def test_samples_show_the_images_of_their_prompts(tmp_path):
    """Small, within the page; those that cannot be read, or are not there, by their names."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    PIL.Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    PIL.Image.new("RGB", (60, 20), "blue").save(tmp_path / "turned.jpg", exif=turned())
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    names = ["noise.png", str(tmp_path / "red.png"), "turned.jpg", "text.png", "pipe.png", f"sha256:{'a' * 64}", HOSTILE]
    answers = {"prompt": "<image>?", "policy": "a", "reference": "b", "chosen": "c"}
    rows = [answers | {"step": step, "images": names, "image_folder": str(tmp_path)} for step in (1, 2)]
    odd = [answers | {"images": "red.png"}, answers | {"images": [3, None, "x"], "image_folder": {}}]
    run = runs.write(tmp_path / "run", steps=8)
    (run / "samples.jsonl").write_text(runs.lines([*rows, *odd]))
    text = page.render(history.read_all([run]))
    uris = re.findall('<img src="(data:[^"]*)" alt="([^"]*)"', text)
    assert [name for _, name in uris] == ["noise.png", f"{tmp_path}/red.png", "turned.jpg"] * 2
    assert all(len(uri) <= 20_000 * 4 / 3 + 30 for uri, _ in uris)
    noise, red, upright = (PIL.Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri, _ in uris[:3])
    assert red.size == (30, 20) and red.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert upright.size == (20, 60) and noise.size[0] * 3 == noise.size[1] * 4 and noise.size[0] >= 80
    unread = re.findall('<span class="unread"[^>]*>([^<]*)</span>', text)
    assert unread[0] == "x" and unread[1:4] == ["text.png", "pipe.png", f"sha256:{'a' * 64}"]
    assert HOSTILE not in text


def turned() -> PIL.Image.Exif:
    """As a camera that was held upright writes."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return exif


def test_text_of_runs_is_text(tmp_path):
    run = runs.write(tmp_path / "<b>a", steps=8)
    (run / "samples.jsonl").write_text(
        runs.lines([{"prompt": HOSTILE, "policy": HOSTILE, "reference": "x", "chosen": HOSTILE}])
    )
    (run / "config.resolved.yaml").write_text(f"model: {json.dumps({HOSTILE: HOSTILE})}\n")
    (run / "env.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    event = {"time": runs.when(1), "event": HOSTILE, HOSTILE: HOSTILE, "lone": "\ud800"}
    with open(run / "events.jsonl", "a") as file:
        file.write(runs.lines([event]))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            runs.lines([{"step": 9, "loss": 1.0, HOSTILE: 2.0}, {"step": 9, "eval_loss": 1.0, f"eval_{HOSTILE}": 2.0}])
        )
    (run / "logs/rank-0.log").write_text(f"warning: {HOSTILE}\ndata: {HOSTILE}\n")
    (run / "run.json").write_text(json.dumps({"run_id": "x", "state": "failed", "error": HOSTILE}))
    found = read(run)
    plain, text = page.render(read(runs.write(tmp_path / "a", steps=8))), page.render(found)
    assert text.count("<script") == plain.count("<script") == 2 and "<img" not in text and "7*7" in text
    assert "\u202e" not in text and "\x1b" not in text
    text.encode()
    assert Elements(text).inside["script"][1] == Elements(plain).inside["script"][1]
    assert json.loads(Elements(text).inside["script"][0])["charts"][-1]["curves"][0]["key"]
    said = tables.markdown(found)
    assert "<script" not in said and "<img" not in said
    assert all(line.count("|") - line.count("\\|") in (3, 9) for line in said.splitlines() if line.startswith("| ")), said
    rows = list(csv.reader(io.StringIO(tables.long_form(found))))
    assert {len(row) for row in rows} == {4}


def test_runs_with_nothing_to_show(tmp_path):
    """Prepared, empty, of an older dspref, with a loss that is no number, with a single step, with numbers beyond all."""
    (tmp_path / "prepared/submit").mkdir(parents=True)
    (tmp_path / "prepared/submit/config.yaml").write_text("train: {max_steps: 9}\n")
    for name, metrics in {
        "empty": "", "old": '{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n',
        "one": '{"step": 5, "loss": 0.5, "x": 1}\n',
        "nan": '{"step": 1, "loss": null, "grad_norm": NaN, "learning_rate": 0.0}\n', "cut": '{"step": 1, "loss": 1}\n{"st',
        "evaluated": '{"step": 0, "eval_loss": 0.5, "eval_x": 3}\n', "negative": '{"step": 1, "loss": 1, "grad_norm": -1}\n',
        "huge": f'{{"step": {10**17}, "loss": {10**299}}}\n{{"step": 3, "loss": 1e-300, "perf/data_seconds": 0}}\n',
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(metrics)
    found = read(tmp_path)
    assert len(found) == 9
    for one in [*([run] for run in found), found]:
        text = page.render(one)
        json.loads(Elements(text).inside["script"][0])
        assert tables.markdown(one).startswith("## dspref report: ") and tables.long_form(one).startswith(
            "run,step,key,value\n"
        )
    by_name = {run.name: run for run in found}
    assert "No step has been logged yet" in page.render([by_name["empty"]])
    assert "loss: 1 of 1 values are not finite" in page.render([by_name["nan"]])
    assert "1 line passed over" in page.render([by_name["cut"]])
    assert "run.json is missing" in page.render([by_name["old"]])


def test_answers_are_compared_word_by_word():
    told = page.compared(Sample(3, "p", "the red fox runs", "the brown fox", None))
    assert [part.text for part in told.reference or [] if part.changed] == ["brown"]
    assert [part.text for part in told.policy or [] if part.changed] == ["red", " runs"]
    assert "".join(part.text for part in told.policy or []) == "the red fox runs"
    long = "word " * 5000
    told = page.compared(Sample(None, "p", long, long[:-5] + "end", None))
    assert "".join(part.text for part in told.policy or []) == long
    assert page.compared(Sample(None, "p", None, "r", None)).policy is None
    steps = page.by_step([Sample(step, "p", "a", "b", None) for step in (3, None, 12, 3)])
    assert [(step, len(answers)) for step, answers in steps] == [("at the end", 1), ("at step 12", 1), ("at step 3", 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_markdown_compares_runs(tmp_path):
    found = read(
        runs.write(tmp_path / "a", steps=40), runs.write(tmp_path / "b", steps=40, rate=1e-6, seed=3, state="failed")
    )
    said = tables.markdown(found)
    assert "| state | finished | failed |" in said and "| train.learning\\_rate | 5e-07 | 1e-06 |" in said
    assert "objective.beta" not in said and "output\\_dir" not in said, "only what differs, and what was meant to"
    assert re.search(r"\| a: eval \| 40 \| 0\.48 \| 0\.47 at 30 \| 0\.75 \| 0\.75 at 40 \|", said), said
    assert "warning: step 9 skipped" in said and "resume at step 20" in said and "left out 3 of 1305 rows" in said


def test_csv_has_every_value_to_the_last_digit(tmp_path):
    run = runs.write(tmp_path / "=a", steps=40)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "loss": null, "grad_norm": 0.1}\n')
    rows = list(csv.DictReader(io.StringIO(tables.long_form(read(run)))))
    assert {row["run"] for row in rows} == {"'=a"}, "a spreadsheet takes it for no formula"
    told = {(int(row["step"]), row["key"]): row["value"] for row in rows}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    given = {(record["step"], key): value for record in records for key, value in record.items() if key != "step"}
    assert len(told) == len(rows) == len(given)
    assert all(told[at] == ("" if value is None else repr(float(value))) for at, value in given.items())


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        runs.write(tmp_path / "all" / name, steps=8)
    assert call("all/a", "all/b") == 0 and "report.html: written" in capsys.readouterr().out
    first = Path("report.html").read_text()
    assert first.startswith("<!doctype html>") and "<title>a, b · dspref report</title>" in first
    assert call("all", "-o", "x.html") == 0 and call("all", "--format", "html", "--output", "y.HTML") == 0
    capsys.readouterr()
    assert call("all/a", "--format", "csv") == 0 and "\n\n" not in capsys.readouterr().out
    assert call("all/a", "--format", "md") == 0 and capsys.readouterr().out.startswith("## dspref report: a\n")
    assert call("all/a", "-o", "x.csv") == 0 and Path("x.csv").read_text().startswith("run,step,key,value\n")
    assert not Path("report.md").exists() and not Path("report.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "none: holds no dspref run; give the output_dir of one"),
        (["a", "none"], "none: holds no dspref run"),
        (["a/run.json"], "a/run.json: is no folder"),
        (["a", "-o", "x.json"], "-o x.json: must end in .html, .png, .md or .csv"),
        (["a", "-o", "a/metrics.jsonl"], "must end in"),
        (["a", "-o", "x.md", "--format", "csv"], "-o x.md: is the name of no csv file; use -o x.csv"),
        (["a", "-o", "no/x.html"], "-o no/x.html: there is no folder no; make it"),
        (["a", "-o", "folder.html"], "-o folder.html: is a folder"),
        (["a", "--format", "pdf"], "pdf"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.write(tmp_path / "a", steps=4)
    Path("folder.html").mkdir()
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder.html"], "nothing is written"


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.write(tmp_path / "a", steps=4)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert call("a", "--format", "png") == 4
    assert capsys.readouterr().err == "--format png: needs matplotlib, which is not here; pip install 'dspref[plots]'\n"
    assert not Path("report.png").exists()


def test_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra dspref[plots] is not installed")
    monkeypatch.chdir(tmp_path)
    runs.write(tmp_path / "all/$a_{x}", steps=1300)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    for words in (["all", runs.write(tmp_path / "b", steps=8, rate=1e-3)], ["empty"]):
        assert call(*words, "-o", "x.png") == 0
        content = Path("x.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 2_000


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped


def test_the_library_is_the_one_that_is_named():
    listed = re.findall(r"`(uplot/[\w.]+)` \| uPlot ([\d.]+) \| `(\w{64})`", (ASSETS / "README.md").read_text())
    assert [name for name, _, _ in listed] == ["uplot/uPlot.iife.min.js", "uplot/uPlot.min.css"]
    for name, version, digest in listed:
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest
        assert name.endswith("css") or f"(v{version})" in (ASSETS / name).read_text()[:200]
        assert f"uPlot {version}" in (ASSETS / "report.html").read_text()
    assert "MIT License" in (ASSETS / "uplot/LICENSE").read_text()


def test_our_script_makes_no_markup_of_text():
    script = (ASSETS / "report.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(|XMLHttp", script
    )


def test_the_wheel_ships_the_assets(tmp_path):
    """As hatch would build it: of the package all files that git does not ignore."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["dspref"] and not {"include", "exclude", "only-include"} & set(wheel)
    builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    included = {file.distribution_path for file in builders.WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"dspref/report/assets/{path.relative_to(ASSETS)}" for path in ASSETS.rglob("*") if path.is_file()} <= included


def test_forms_are_those_of_the_command():
    assert set(written.FORMS) == {form.value for form in looking.Form} == set(written.SUFFIXES.values())
