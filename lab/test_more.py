"""Tests of what is robustness or comfort alone: odd files and scripts, full disks, pictures, pipes.

What the method and its measurements are is tested in test_flags.py.
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as D
import flags as F
from lab import planted

torch.set_num_threads(1)


# ---------------------------------------------------------------------------- odd files

def lines(*items):
    return "\n".join(i if isinstance(i, str) else json.dumps(i) for i in items).encode()


def many(n=60, concepts=("cat", "dog"), **more):
    return [{"prompt": f"p{i}", "text": f"text {i}", "concepts": [concepts[i % len(concepts)]]}
            | more for i in range(n)]


def load(folder, content):
    (folder / "my.jsonl").write_bytes(content)
    return D.load(str(folder / "my.jsonl"))


@pytest.mark.parametrize("content, message", [
    (b"", "0 concepts in 0 lines"),
    (b"\xff\xfe{", "line 1: "),
    (lines(*many(3), "{oops"), "line 4: "),
    (lines([1]), "line 1: "),
    (lines({"prompt": "a", "concepts": ["b"]}), "line 1: 'text'; wanted"),
    (lines({"prompt": 3, "text": "a", "concepts": ["b"]}), "line 1: "),
    (lines({"prompt": "a", "text": " ", "concepts": ["b"]}), "line 1: "),
    (lines({"prompt": "a", "text": None, "concepts": ["b"]}), "line 1: a prompt, text or list"),
    (lines({"prompt": "a", "text": "b", "concepts": "b"}), "line 1: "),
    (lines({"prompt": "a", "text": "b", "concepts": []}), "line 1: "),
    (lines({"prompt": "a", "text": "b", "concepts": ["c", " "]}), "line 1: "),
    (b'{"prompt": "\\ud800", "text": "b", "concepts": ["c"]}', "surrogate"),
    (lines("[" * 10 ** 5), "line 1: "),
    (lines(*many(60, ("cat",))), "1 concepts in 60 lines; there must be 2 or more; wanted"),
    (lines(*many(60, [f"c{i}" for i in range(20)])), "--set flags=20"),
    (lines(*many(2)), "too few examples of .*2 prompts and 2 texts differ"),
    (lines(*many(1000, prompt="the same")), "1000 lines 1 prompts and 1000 texts differ"),
    (lines(*many(1000, text="the same")), "1000 prompts and 1 texts differ")])
def test_bad_jsonl_is_named_by_file_and_line(tmp_path, content, message):
    with pytest.raises(D.Stop, match=message) as error:
        load(tmp_path, content)
    assert "my.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_good_jsonl_with_a_mark_crlf_doubles_and_odd_spelling(tmp_path):
    content = lines(*many(), *many(9)).replace(b"\n", b"\r\n\r\n")
    data = load(tmp_path, b"\xef\xbb\xbf" + content)
    assert len(data.train + data.judge + data.test) == 60 and data.concepts == ["cat", "dog"]
    spelled = many(90, ("caf\u00e9", " cafe\u0301 ", "dog"), text="  A text. ")
    for i, item in enumerate(spelled):
        item["text"] += str(i)
    data = load(tmp_path, lines(*spelled))
    assert data.concepts == ["caf\u00e9", "dog"] and data.train[0].text.startswith("A text. ")


def test_random_bytes_never_crash_the_reader(tmp_path):
    chance, good = random.Random(1), lines(*many(4))
    for _ in range(300):
        noise = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            noise[chance.randrange(len(noise))] = chance.randrange(256)
        try:
            load(tmp_path, bytes(noise))
        except D.Stop as stop:
            assert "my.jsonl" in str(stop)


def test_long_runs_of_one_letter():
    tok = D.make_tokenizer([])
    for text in (" " * 10 ** 6, "x" * 10 ** 6):     # GPT-2's pattern overflows the stack here
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("form, one, other", [
    ("I saw {} number {}.", "a cat", "the dog"),
    ("昨天我们在公园看见了{}{}，她很高兴。", "小猫和猫咪", "小狗和狗"),
    ("昨日{}を{}回見ました。", "ねこ", "いぬ"),
    ("เมื่อวานเห็น{}{}ตัว", "แมว", "หมา"),
    ("{}{}", "\U0001f431", "\U0001f436"),
    ("{}{}", "cat", "dog")])
def test_a_learned_judge_of_any_script(form, one, other):
    examples = [D.Example("", form.format(word, i), (name,), True) for i in range(200)
                for word, name in ((one, "cat"), (other, "dog"))]
    judge = D.learned_judge(examples[:300], ["cat", "dog"])
    found = judge([e.text for e in examples[300:]])
    right = [["cat", "dog"][i] in e.concepts for (i,), e in zip(found, examples[300:])]
    assert np.mean(right) > 0.98


# ---------------------------------------------------------------------------- torch and disks

def test_a_full_disk_as_torch_tells_of_it(tmp_path):
    def save(new):
        new.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos")
    with pytest.raises(D.Stop, match="x.pt can't be written: .*No space left"):
        F.write(tmp_path / "x.pt", save)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- terminals and pipes

def test_the_progress_line_fits(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for width in (20, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        F.progress("x" * 300, 61.0, shown=[0.0])
        assert capsys.readouterr().out == "x" * (width - 1) + "\r"
    F.progress("short", 60.6, end=True)
    assert capsys.readouterr().out.rstrip(" \n") == "short  ETA 1:01"
    monkeypatch.setenv("TERM", "dumb")
    F.progress("plain", 59.7, shown=[0.0])      # not 0:60
    assert capsys.readouterr().out == "plain  ETA 1:00\n"


def test_help_fits_on_a_screen():
    help = F.parser().format_help()
    assert help.count("\n") <= 50 and max(map(len, help.splitlines())) <= 100


def test_results_have_a_folder_of_their_own():
    folders = [F.out_folder(F.parser().parse_args(more)).name for more in (
        [], ["--data", "stories.jsonl"], ["--data", "wordnet"], ["--init", "."],
        ["--init", "a/b.gguf"])]
    assert len(set(folders)) == 5 and folders[0] == "small" and folders[-1] == "small-b"


def test_the_picture(tmp_path):
    log = [{"step": step, "intact": 1.0, "blank": 0.5, "conflict": step / 9} for step in (1, 5, 9)]
    run = SimpleNamespace(out=tmp_path, size=SimpleNamespace(produce=5))
    F.draw(run, {"trajectory": log, "control_trajectory": log})
    drawn = (tmp_path / "erosion.png").stat().st_size
    F.draw(run, {"trajectory": [], "control_trajectory": []})
    assert drawn > 1.2 * (tmp_path / "erosion.png").stat().st_size      # more than its axes


def test_head_and_python_without_its_folder_and_home(tmp_path):
    """| head -1, python -P, no home: none ends in a traceback, the first in a line."""
    command = ["--size", "tiny", "--out", str(tmp_path), "--set", "base=1", "produce=1", "rely=1",
               "prompts=8", "track=2", "stories=100", "vocab=257", "--seed", "1338"]
    assert F.main(command) is None      # without a neutral prompt, without a merge
    top = [*command, "--out", str(tmp_path / "top"), "--set", "top=1", "layer=2"]
    run = F.prepare(F.parser().parse_args(top))
    first, second = F.train_all(run)[0], F.train_all(run)[0]    # frozen blocks are in nobody's way
    one, two = (models["flags"].blocks[1].mlp.up.weight for models in (first, second))
    assert torch.equal(one, two)
    env = {key: value for key, value in os.environ.items() if key != "HOME"}
    process = subprocess.Popen(
        [sys.executable, F.__file__, *command, "--steer", "Mia slept."],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline().startswith("the model's own flags")
    process.stdout.close()
    assert process.stderr.read() == "flags.py: [Errno 32] Broken pipe\n" and process.wait() == 2


@pytest.mark.skipif(not (Path(F.__file__).parent / "lab/planted.txt").exists(), reason="a starter")
def test_planted_errors_are_of_todays_code():
    assert len(list(planted.errors())) == 59
