"""Prompts from every side, answers streamed; the model itself is stood in for."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from qmemtune.cli.app import main
from qmemtune.config.compose import compose, to_yaml
from qmemtune.errors import UserError


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    """A finished run whose model says back what it was given."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "r" / "1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(compose(["recipe=quickstart"]).config))
    (folder / "summary.json").write_text("{}")

    def stream_answer(loaded, prompt, *, instruction, max_new_tokens, temperature):
        said = prompt if isinstance(prompt, str) else " | ".join(m["content"] for m in prompt)
        yield f"<{said}>"
        yield f"{instruction},{max_new_tokens},{temperature}"

    def load_run(run, config):
        return SimpleNamespace(config=config, source=SimpleNamespace(active=True))

    forms = {"messages": "messages"}
    module = {
        "qmemtune.engine.restore": {"load_run": load_run},
        "qmemtune.evaluation.generate": {"stream_answer": stream_answer, "prompt_ids": lambda loaded, prompt: ([], "")},
        "qmemtune.data.render": {"form_of": lambda data: forms.get(data.format, "prompt_completion")},
    }
    for name, functions in module.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))


@pytest.fixture
def stdin(monkeypatch):
    def give(text: str, *, terminal: bool):
        stream = io.StringIO(text)
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", stream)

    give("", terminal=False)
    return give


@pytest.mark.parametrize("arguments", [["--prompt", "a=b, c"], ["prompt=a=b, c"]])
def test_one_prompt(capsys, stdin, arguments):
    assert main(["generate", *arguments, "instruction=sort", "--max-new-tokens", "5", "--temperature", "0.5"]) == 0
    assert capsys.readouterr().out == "<a=b, c>sort,5,0.5\n"


def test_lines_of_a_file_and_of_stdin(capsys, stdin, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert main(["generate", "--file", "p.txt"]) == 0
    assert capsys.readouterr().out == "<one>None,256,0.0\n<two>None,256,0.0\n"
    stdin("three\n", terminal=False)
    assert main(["generate"]) == 0
    assert capsys.readouterr().out.startswith("<three>")


def test_jsonl_rows_and_json_answers(capsys, stdin, tmp_path):
    # A line separator within a text does not end the line.
    rows = [{"prompt": "one\u2028", "instruction": "i"}, {"messages": [{"role": "user", "content": "two"}]}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8", newline="")
    assert main(["generate", "--file", "p.jsonl", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["answer"] for answer in answers] == ["<one\u2028>i,256,0.0", "<two>None,256,0.0"]


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_a_prompt(capsys, stdin, tmp_path):
    (tmp_path / "p.txt").write_text("one\n", encoding="utf-8-sig")
    (tmp_path / "p.jsonl").write_text('{"prompt": "two"}', encoding="utf-8-sig")
    for file in ("p.txt", "p.jsonl"):
        assert main(["generate", "--file", file]) == 0
    assert capsys.readouterr().out == "<one>None,256,0.0\n<two>None,256,0.0\n"


def test_the_answer_of_a_row_stays_beside_the_models(capsys, stdin, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["qmemtune.evaluation.generate"], "stream_answer", lambda *_, **__: iter(["5"]))
    (tmp_path / "p.jsonl").write_text('{"question": "2 + 2", "answer": "4"}\n{"question": "2 + 3"}')
    assert main(["generate", "--file", "p.jsonl", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["answers"]
    assert first == {"question": "2 + 2", "reference": "4", "answer": "5"}
    assert second == {"question": "2 + 3", "answer": "5"}


@pytest.mark.parametrize("template", ["{instruction}: {prompt}", "{prompt}"])
def test_a_template_of_several_fields_has_the_whole_row(capsys, stdin, tmp_path, monkeypatch, template):
    asked, module = [], sys.modules["qmemtune.evaluation.generate"]
    monkeypatch.setattr(module, "stream_answer", lambda loaded, prompt, **_: asked.append(prompt) or iter("x"))
    row = {"instruction": "Reverse", "prompt": "a b"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert main(["generate", f"data.prompt_template={template}", "--file", "p.jsonl"]) == 0
    assert asked == [row if "instruction" in template else "a b"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "a", "context": "b"}, {"question": "a", "context": "b"}),
        ({"messages": [1], "tools": [2]}, {"messages": [1], "tools": [2]}),
    ],
)
def test_rows_of_other_columns_are_prompts_too(capsys, stdin, tmp_path, monkeypatch, row, prompt):
    asked = []
    monkeypatch.setattr(
        sys.modules["qmemtune.evaluation.generate"],
        "stream_answer",
        lambda loaded, p, **_: asked.append(p) or iter("x"),
    )
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert main(["generate", "--file", "p.jsonl"]) == 0
    assert asked == [prompt]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{x\n', "p.jsonl:2: not valid JSON"),
        ("[1]", "p.jsonl:1: no prompt"),
        ('{"prompt": 5}', "p.jsonl:1: the prompt is no text"),
    ],
)
def test_bad_files_are_named(capsys, stdin, tmp_path, text, problem):
    (tmp_path / "p.jsonl").write_text(text)
    assert main(["generate", "--file", "p.jsonl"]) == 2
    assert problem in capsys.readouterr().err


def test_two_sources_of_prompts_are_refused(capsys, stdin):
    assert main(["generate", "--prompt", "a", "--file", "b"]) == 2


def test_a_chat_has_no_json(capsys, stdin):
    stdin("one\n", terminal=True)
    assert main(["generate", "--json"]) == 2
    assert "a chat gives no JSON" in json.loads(capsys.readouterr().out)["error"]["problem"]


def test_a_chat_goes_on_after_no_answer_and_after_a_mistake(capsys, stdin, monkeypatch):
    def stream_answer(loaded, messages, **_):
        last = messages[-1]["content"]
        if last == "bad":
            raise UserError("cannot be rendered", where="prompt")
        yield "" if last == "quiet" else " | ".join(message["content"] for message in messages)

    monkeypatch.setattr(sys.modules["qmemtune.evaluation.generate"], "stream_answer", stream_answer)
    stdin("one\nquiet\nbad\ntwo\n", terminal=True)
    assert main(["generate", "data.format=messages"]) == 0
    found = capsys.readouterr()
    assert "one | one | two" in found.out
    assert "(no answer)" in found.err
    assert "cannot be rendered" in found.err


def test_chat_takes_each_line_alone_unless_trained_on_conversations(capsys, stdin):
    stdin("one\ntwo\n", terminal=True)
    assert main(["generate"]) == 0
    assert "<one>" in (out := capsys.readouterr().out)
    assert "<two>" in out
    stdin("one\ntwo\n/new\nthree\n", terminal=True)
    assert main(["generate", "data.format=messages"]) == 0
    out = capsys.readouterr().out
    assert "<one | <one>None,256,0.0 | two>" in out
    assert "<three>" in out
