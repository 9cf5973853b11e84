"""`dspref chat` with vision-language models: answers are those of plain transformers, on a terminal and between pipes."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from tiny import save_tiny, save_tokenizer, tiny_config
from tiny_vision import image, save_vision, talkative
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from dspref.chat import choice, talk
from dspref.chat.speaker import Speaker
from dspref.cli import app
from dspref.data import vocabulary
from dspref.data.formats import to_preference
from dspref.errors import ConfigError
from dspref.model.generation import Asked

NEW = 8
KINDS = ["llava", "llava_next", "idefics3"]  # those whose processors load without torchvision


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind, one of text alone, and two images."""
    found = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save_vision(found / kind, kind, seed=3)
        talkative(found / kind)
    save_tiny(found / "text", tiny_config("llama", 259, max_position_embeddings=200), 1)
    save_tokenizer(found / "text")
    for k, name in enumerate(("a.png", "b b.png")):
        PIL.Image.fromarray(image(40, 60 + 8 * k, seed=k)).save(found / name)
    return found


def speaker(folder: Path) -> Speaker:
    tokenizer = vocabulary.load_as_written(str(folder))
    return Speaker.load(str(folder), tokenizer, False, Asked(greedy=True, max_tokens=NEW))


def plain(folder: Path, turns: list[tuple[str, list[Path], str]]) -> str:
    """What `generate` answers to the last of some turns (role, images, text), with what the processor makes of them."""
    lm: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    words: Any = AutoProcessor.from_pretrained(folder)
    messages = [
        {"role": role, "content": [*({"type": "image"} for _ in paths), {"type": "text", "text": text}]}
        for role, paths, text in turns
    ]
    images = [PIL.Image.open(path) for _, paths, _ in turns for path in paths]
    given: Any = {"images": [images] if "idefics3" in folder.name else images} if images else {}
    made = words(text=[words.apply_chat_template(messages, add_generation_prompt=True)], return_tensors="pt", **given)
    made = {name: x for name, x in made.items() if name != "token_type_ids"}
    answer = lm.generate(**made, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return words.tokenizer.decode(answer[0, made["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_talk_about_images_is_what_transformers_generates(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text alone, then two images, then text again about them; what goes wrong in between is a line each."""
    monkeypatch.chdir(folder)
    (tmp_path / "no.png").write_text("no image")
    one = talk.Talk(["m"], [speaker(folder / kind)], "be kind", None)
    one.begin()
    turns: list[tuple[str, list[Path], str]] = [("system", [], "be kind")]
    wrong = {
        f"{tmp_path}/no.png": "no image of a known format",
        "none.png": "none.png: no such file",
        "~no-one/a": "no such user",
    }
    a, b = folder / "a.png", folder / "b b.png"
    answers = []
    for commands, paths, text in (
        ([], [], "hello"),
        (["/image a.png", "/image 'b b.png'"], [a, b], "and?"),
        ([], [], "so?"),
    ):
        for bad, why in wrong.items():
            assert one.obeyed(f"/image {bad}")
            said = capsys.readouterr().out
            assert said.startswith("(not attached: ") and why in said and said.count("\n") == 1
        for command in commands:
            assert one.obeyed(command)
        assert capsys.readouterr().out.count("goes with your next message)") == len(commands)
        one.turn(text)
        turns.append(("user", paths, text))
        answers.append(plain(folder / kind, turns))
        turns.append(("assistant", [], answers[-1]))
        assert f"model> {answers[-1]}" in capsys.readouterr().out
        assert not one.attached and one.messages[-1]["content"] == answers[-1]
    assert len(set(answers)) == 3
    assert one.obeyed("/image") and capsys.readouterr().out == "(not attached: no file is named; /image PATH)\n"
    one.turn("is <image> here?")
    assert "take '<image>' out of the text" in capsys.readouterr().out and one.messages[-1]["content"] == answers[-1]
    one.obeyed("/image a.png")
    one.obeyed("/help")
    assert "/image PATH shows an image with your next message, /reset" in capsys.readouterr().out and one.attached
    assert one.obeyed("/reset") and not one.attached and len(one.messages) == 1


def call(*arguments: str, lines: str) -> tuple[int, list[dict[str, Any]], str]:
    done = CliRunner().invoke(app, ["chat", *arguments, "--greedy", "--max-tokens", str(NEW), "--json"], input=lines)
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def test_between_pipes_rows_have_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    a, b = folder / "a.png", folder / "b b.png"
    inline = "data:image/png;base64," + base64.b64encode(a.read_bytes()).decode()
    parts = [{"type": "text", "text": "is"}, {"type": "image", "image": "a.png"}]
    rows = [
        {"prompt": "and?", "images": ["a.png", "b b.png"]},
        {"prompt": "and?", "images": ["none.png"]},
        {"prompt": "and?", "image": inline},
        {"prompt": [{"role": "user", "content": parts}], "images": []},
        {"prompt": "no images here"},
        {"prompt": "and?", "images": ["a.png"], "system": "be kind", "chosen": "is no part of it"},
        {"prompt": "a\ud800", "images": ["a.png"]},
        {"prompt": 7, "images": ["a.png"]},
        {"prompt": "and?", "tools": [{"name": "x"}]},
        {"question": "a text that is JSON"},
    ]
    code, found, said = call(str(folder / "llava"), lines="".join(json.dumps(row) + "\n" for row in rows) + "hello\n")
    asked = [
        [("user", [a, b], "and?")],
        [("user", [a], "and?")],
        [("user", [], "no images here")],
        [("system", [], "be kind"), ("user", [a], "and?")],
        [("user", [], json.dumps(rows[9]))],
        [("user", [], "hello")],
    ]
    expected = [plain(folder / "llava", turns) for turns in asked]
    assert [row["answers"][0] for row in found if row["line"] in (1, 3, 5, 6, 10, 11)] == expected
    assert found[1]["answers"] == [None] and found[3]["answers"][0] not in (None, *expected)
    assert found[0] == {"line": 1, **rows[0], "answers": [expected[0]]}
    assert found[4]["prompt"] == "no images here" and found[9]["prompt"] == json.dumps(rows[9])
    assert [row["answers"] for row in found[6:9]] == [[None]] * 3
    assert code == 3 and "line 2: images[0]: none.png: no such file\n" in said
    assert "line 7: prompt: holds a lone surrogate (\\ud800)\n" in said
    assert "line 8: prompt: int, and no text" in said and "line 9: tools: not read here\n" in said
    assert "4 prompts could not be read; mend them" in said and "Traceback" not in said


UNLIKE_THE_MODEL: list[tuple[dict[str, Any], str]] = [
    ({"patch_size": 7}, r"its processor writes \d+ tokens for images of which its tower makes \d+ features"),
    ({"image_processor": {"crop_size": {"height": 42, "width": 42}}}, "its tower does not take what its processor makes"),
]


@pytest.mark.parametrize(("change", "told"), UNLIKE_THE_MODEL)
def test_a_processor_that_is_not_made_for_the_model_is_told(
    change: dict[str, Any], told: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "llava", tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    known = json.loads(path.read_text())
    own = {name: {**known[name], **value} if isinstance(value, dict) else value for name, value in change.items()}
    path.write_text(json.dumps(known | own))
    with pytest.raises(ConfigError, match=f"{tmp_path}/model: {told}.*; fix: set in "):
        speaker(tmp_path / "model")


def test_a_model_of_text_is_shown_no_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = json.dumps({"prompt": "and?", "images": [str(folder / "a.png")]}) + "\nhello\n"
    code, found, said = call(str(folder / "text"), lines=lines)
    assert code == 3 and "line 1: images: the model reads text alone" in said
    assert found[0]["answers"] == [None] and isinstance(found[1]["answers"][0], str)
    one = talk.Talk(["m"], [speaker(folder / "text")], None, None)
    assert one.obeyed(f"/image {folder}/a.png") and not one.attached and "/image" not in one.help
    assert capsys.readouterr().out.endswith("(not attached: the model reads text alone)\n")


def test_a_choice_about_an_image_is_a_row_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = talk.Talk(["m"], [speaker(folder / "llava")], "be kind", None)
    one.begin()
    one.obeyed(f"/image {folder}/a.png")
    one.turn("and?")
    row = choice.row_of(one.messages[:-1], "good", "bad", True)
    found = to_preference(json.loads(json.dumps(row)))
    assert list(found.images) == [f"{folder}/a.png"]
    assert [message["content"] for message in found.prompt] == ["be kind", "\ufdd0and?"]  # type: ignore[index]
