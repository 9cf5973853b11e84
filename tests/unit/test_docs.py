"""Documents that are written by a program are those that it would write now."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import runs
from tiny import save_tiny, save_tokenizer, tiny_config
from typer.testing import CliRunner

from dspref import cli, config
from dspref.cli import app
from dspref.config import hints
from dspref.run import status

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_objectives_md_is_current() -> None:
    written = runpy.run_path(str(DOCS / "make_objectives.py"))["document"]()
    assert (DOCS / "objectives.md").read_text(encoding="utf-8") == written, "run: python docs/make_objectives.py"


@pytest.mark.parametrize(("name", "function"), [("keys.md", "keys"), ("from-other-trainers.md", "from_others")])
def test_the_tables_of_keys_are_current(name: str, function: str) -> None:
    written = runpy.run_path(str(DOCS / "make_keys.py"))[function]()
    assert (DOCS / name).read_text(encoding="utf-8") == written, "run: python docs/make_keys.py"


def test_the_tables_of_deepspeeds_keys_are_current() -> None:
    written = runpy.run_path(str(DOCS / "make_ds_keys.py"))["document"]()
    assert (DOCS / "deepspeed.md").read_text(encoding="utf-8") == written, "run: python docs/make_ds_keys.py"


def test_the_runs_of_the_curves_are_good_configs() -> None:
    made = runpy.run_path(str(DOCS / "make_curves.py"))
    for settings in [made["BEGIN"], *made["RUNS"].values()]:
        keyed = {word.split("=")[0]: word for word in settings}
        config.load(DOCS.parent / "launch/configs/quickstart.yaml", [*keyed.values()])
    drawn = {name for name in (DOCS / "curves.md").read_text().split("`") if name in made["RUNS"]}
    assert drawn == {*made["RUNS"]} == {*made["COLOURS"]}


def test_every_key_of_the_schema_is_in_the_reference() -> None:
    text = (DOCS / "keys.md").read_text(encoding="utf-8")
    for path in {path for paths in hints.all_homes().values() for path in paths}:
        assert f"`{path}`" in text, path


def test_links_lead_somewhere() -> None:
    """To a file, and to a heading of it."""
    for page in (DOCS.parent / "README.md", *DOCS.glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                name, _, heading = link.partition("#")
                target = page.parent / name if name else page
                assert target.exists(), f"{page.name}: {link}"
                assert not heading or heading in headings_of(target), f"{page.name}: {link}"


def headings_of(page: Path) -> set[str]:
    """As GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_starting_points_are_those_of_the_recipes() -> None:
    rows = re.findall(r"^\|.*\| `([\w.*]+\.yaml)` \|$", (DOCS / "choosing.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 11
    for line in (DOCS / "choosing.md").read_text(encoding="utf-8").splitlines():
        if not (found := re.search(r"`([\w.*]+\.yaml)` \|$", line)):
            continue
        _, beta, rate, pairs, _ = (cell.strip() for cell in line.strip("|").split("|"))
        run = config.load(next((DOCS.parent / "launch" / "configs").glob(found[1])))
        assert run.objective.beta in numbers_in(beta), line
        assert run.train.learning_rate in numbers_in(rate), line
        assert run.train.pairs_per_step in numbers_in(pairs), line


def numbers_in(cell: str) -> set[float]:
    return {float(number) for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", cell)}


def test_the_commands_for_those_who_come_from_elsewhere_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Path(__file__).parent / "convert" / "theirs"
    files = {"their.yaml": "handbook_dpo.yaml", "train_dpo.py": "trl_script.py", "train_dpo.sh": "openrlhf_dpo.sh"}
    for name, their in files.items():
        shutil.copy(theirs / their, tmp_path / name)
    lines = re.findall(r"^    (dspref .*?)(?:  +#.*)?$", (DOCS / "from-other-trainers.md").read_text(), flags=re.M)
    assert len(lines) == 4
    monkeypatch.chdir(tmp_path)
    for line in lines:
        if line == "dspref check run.yaml":  # what only a person knows is filled in by then
            written = Path("run.yaml").read_text()
            assert written.count(": FILL_IN/") == 1
            Path("run.yaml").write_text(written.replace(": FILL_IN/", ": me/"))
        done = CliRunner().invoke(app, shlex.split(line)[1:], prog_name="dspref")
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.parametrize(
    "block", re.findall(r"^```\n\$ dspref (.*?)^```$", (DOCS / "data.md").read_text(encoding="utf-8"), re.M | re.S)
)
def test_what_data_md_shows_is_what_the_command_says(block: str) -> None:
    command, _, shown = block.partition("\n")
    result = CliRunner().invoke(app, shlex.split(command), prog_name="dspref")
    assert result.exit_code == 0 and shown.strip() and shown.strip("\n") in result.stdout


def test_the_commands_of_ten_minutes_md_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in the place of its own, and all but those that need weights: these run in the slow suite."""
    text = (DOCS / "ten-minutes.md").read_text(encoding="utf-8")
    model = tmp_path / "models" / "smollm2"
    save_tiny(model, tiny_config("llama", save_tokenizer(model)), 1)
    said = {"conversations": ("human", "say a"), "chosen": ("gpt", "a"), "rejected": ("gpt", "b")}
    row: dict = {side: {"from": who, "value": words} for side, (who, words) in said.items()}
    (tmp_path / "dpo_en_demo.json").write_text(json.dumps([row | {"conversations": [row["conversations"]]}] * 300))
    (tmp_path / "first.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    for name in ("first", "second"):
        runs.write(tmp_path / "runs" / name, steps=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = []
    for command in re.findall(r"^    dspref (.*?)(?:  +#.*)?$", text, flags=re.M):
        words = shlex.split(command)
        if words[0] in ("train", "chat", "evaluate"):
            assert words[1] in ("first.yaml", "runs/first")
            words = ["check", "first.yaml", *(word for word in words[2:] if re.match(r"[\w.]+=", word))]
        done = CliRunner().invoke(app, words, prog_name="dspref")
        assert done.exit_code == 0, (command, done.output)
        ran.append(words[0])
    assert {"check", "inspect", "plan", "status", "report"} <= set(ran)
    images = re.findall(r"\]\((images/[^)]+)\)", text)
    assert len(images) == 4 and all((DOCS / image).stat().st_size < 120_000 for image in images)
    assert not re.search(r"/root|/work|/home/", text)


def test_the_commands_of_seeing_md_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "seeing.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (dspref .*)$", text, flags=re.M)
    assert len(commands) >= 8
    for name in ("a", "b", "mine"):
        runs.write(tmp_path / "runs" / name, steps=8)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        with pytest.raises(SystemExit) as end:
            cli.app(shlex.split(command)[1:])
        missing = command.endswith(".png") and end.value.code == 4  # without the extra dspref[plots]
        assert not end.value.code or missing, command
    assert {"report.html", "both.html", "runs.csv"} <= {path.name for path in tmp_path.iterdir()}
    assert re.split(r"  +", text.split("```\n")[1].splitlines()[0]) == list(status.COLUMNS)
    images = re.findall(r"\]\((images/[^)]+)\)", text)
    assert len(images) == 2 and all((DOCS / image).stat().st_size < 120_000 for image in images)
