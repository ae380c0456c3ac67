"""The course is honest: originals pass, wrong answers fail with a hint, starters can be made."""
import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flags as F

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "exercises").exists():
    pytest.skip("exercises/ is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT / "exercises"))
import check
import make


def wrong_answers(number):
    """Pairs (old, new) of wrong_answers.txt: an answer is the original with old replaced by new."""
    for line in Path(__file__).with_name("wrong_answers.txt").read_text().splitlines():
        exercise, change = line.split(maxsplit=1)
        if exercise == number:
            old, news = change.split(" => ")
            yield from ((old, new) for new in news.split(" OR "))


def originals(number):
    """For each function of an exercise its module, its name and its code."""
    for entry in make.OPEN[number]:
        file, name = entry.split()
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        yield module, name, ast.unparse(make.find(Path(ROOT, file).read_text(), name))


@pytest.mark.parametrize("number", ["1", "2", "3", "4", "6", "7", "8", "9", "10"])
def test_originals_pass_and_wrong_answers_fail_with_a_hint(number, monkeypatch):
    torch.set_num_threads(1)
    points, total, hint = check.check(number)
    assert points == total > 2 and hint == "", hint
    for old, new in wrong_answers(number):
        found = [original for original in originals(number) if old in original[2]]
        assert found, f"{number}: {old!r} is not in the original"
        module, name, code = found[0]
        space = dict(vars(module))
        exec(code.replace(old, new), space)
        with monkeypatch.context() as patch:
            patch.setattr(f"{module.__name__}.{name}", space[name.split(".")[-1]])
            points, total, hint = check.check(number)
        assert hint and "\n" not in hint and points < total, (number, old, new)


@pytest.mark.parametrize("error, said", [
    (SystemExit(0), "SystemExit"), (KeyboardInterrupt(), "KeyboardInterrupt"),
    (SyntaxError("expected ':'", ("flags.py", 131, 1, "")), "expected ':' (flags.py, line 131)")])
def test_whatever_a_students_code_raises_is_a_hint(error, said, monkeypatch):
    def steer(*args):
        raise error
    monkeypatch.setattr(F, "steer", steer)
    points, total, hint = check.check("1")
    assert said in hint and "\n" not in hint and points == 0 < total


@pytest.mark.parametrize("code, said", [
    ("x[..., -flags.count:] = 1.0; return x", "only the channels of flags.slice change"),
    ("return x[0] @ x[0]", "(<string>, line 4)"),       # where it broke, and nothing else
    ("pass", "docstring says? An edit returns x; install, or a method, a pair of functions")])
def test_a_hint_says_what_is_wrong(code, said, monkeypatch):
    space = dict(vars(F))
    exec("def install(flags, batch, p):\n def edit(layer, x, pos):\n  if layer < flags.layer: "
         f"return x\n  {code}\n return edit, None", space)
    monkeypatch.setattr(F, "install", space["install"])
    assert check.check("3")[2].endswith(said)


def test_there_are_enough_wrong_answers():
    assert sum(len(set(wrong_answers(number))) for number in check.CHECKS) == 153


def curves_of(run, change):
    """Curves as the exercise wants them, but for a change."""
    begin, end = run.size.produce, run.size.produce + run.size.rely
    points = lambda conflict, flag_loss: [
        {"step": step, "stage": 1 + (step > begin), "intact": 1, "blank": 0, "flag_loss": flag_loss,
         "conflict": conflict if step > begin else 0.2} for step in (begin, 40, 80, 120, end)]
    space = {"points": points, "run": run, "weights": [0.0, 1.0, 1.0, 1.0], "curves": {
        "control": points(0.2, 1.0), "p = 0": points(0.3, 0.1), "p = 1": points(1.0, 0.1)}}
    exec(change, space)
    for weight in space["weights"]:     # of the model that each training begins with
        torch.nn.init.constant_(run.base.weight, weight)
        F.optimizers(run.base)
        run.flags.height = space.get("height", 7.0)
    return space["curves"]


@pytest.mark.parametrize("change, hint", [
    ("pass", ""),
    ("del curves['control']", "without the control"),
    ("del curves['p = 0']", "two curves"),
    ("curves = {k: v[-1:] for k, v in curves.items()}", "the final point alone"),
    ("curves = {k: v[1:] for k, v in curves.items()}", "begins at the end of stage 1"),
    ("curves = {k: v[:-1] for k, v in curves.items()}", "both stages"),
    ("curves['p = 1'] = curves['p = 0']", "the flags should rule"),
    ("curves['p = 0'] = curves['p = 1']", "nobody is supplied"),
    ("curves['control'] = curves['p = 0']", "the control has no flag loss"),
    ("curves['p = 0'] = points(0.3, 1.0)", "flags are still produced"),
    ("curves['p = 1'][0]['conflict'] = 0.9", "stage 1 is the same"),
    ("weights[:] = 4 * [0.0]", "train run.base"), ("weights[0] = 1.0", "train run.base first"),
    ("weights[1] = 2.0", "one trained base"), ("weights.pop()", "three trainings"),
    ("weights.clear()", "train run.base first"), ("height = 1.0", "a raised flag"),
    ("height = 6.0", "a raised flag")])
def test_wrong_experiments_fail_with_a_hint(change, hint, monkeypatch):
    size = dataclasses.replace(F.SIZES["tiny"], rely=160)

    def prepare(args):
        base = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(base.weight)
        return SimpleNamespace(size=size, base=base, flags=F.Flags(1, 0, 4))
    monkeypatch.setattr(F, "prepare", prepare)
    monkeypatch.setattr(F, "optimizers", lambda model: [])
    monkeypatch.setattr("lab.producing.experiment", lambda run: curves_of(run, change))
    found = check.check("5")[2]
    points, total, _ = check.check("5")
    assert hint in found and bool(found) == bool(hint) == (points < total)


def test_the_open_exercise_wants_three_fresh_seeds(tmp_path):
    folders = [tmp_path / str(i) for i in range(3)]

    def hint(name="ada", **more):       # of three runs, where the second has something else
        for i, (folder, seed) in enumerate(zip(folders, seeds)):
            result = {"seed": seed, "steer": {"compose3": {"mean": 0.97, "n": 256}},
                      "data": "stories", "read": {"auc": {"n": 16}}, "size": "small",
                      "parameters": 935_040, "loss": {"flags": 0.70, "control": 0.70}}
            folder.mkdir(exist_ok=True)
            (folder / "results.json").write_text(json.dumps(result | (more if i == 1 else {})))
        return check.check("11", name, folders)[2]
    points, _, wanted = check.check("11", "ada", [])
    assert points == 0
    seeds = json.loads(wanted[wanted.index("["):wanted.index("]") + 1])
    assert hint() == ""
    assert "seeds must be" in hint("eve")
    assert "with all 16 flags" in hint(read={"auc": {"n": 3}})
    assert "with all 16 flags" in hint(data="my.jsonl", steer={"compose3": None})
    assert "the model of --size small" in hint(size="tiny")
    assert "the model of --size small" in hint(parameters=2e6)
    assert "one seed" in hint(loss={"flags": 0.72, "control": 0.7})
    assert "lowest" in hint(steer={"compose3": {"mean": 0.95, "n": 256}})
    assert "at least 256" in hint(steer={"compose3": {"mean": 0.97, "n": 20}})
    (folders[1] / "results.json").write_text("{")
    assert f"there is no whole {folders[1]}" in check.check("11", "ada", folders)[2]
    (folders[1] / "results.json").unlink()
    assert f"there is no whole {folders[1]}" in check.check("11", "ada", folders)[2]
    command = [sys.executable, ROOT / "exercises" / "check.py", "11", "--name", "ada", *folders]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 1 and f"there is no whole {folders[1]}" in done.stdout, done.stderr


@pytest.mark.parametrize("number", [str(n) for n in range(1, 12)])
def test_every_starter_imports_and_has_one_exercise_open(number, tmp_path):
    folder = tmp_path / "starter"
    make.make(number, folder)
    files = {entry.split()[0] for entry in make.OPEN[number]}
    for path in ROOT.rglob("*.py"):
        mine = folder / path.relative_to(ROOT)
        if mine.exists():
            changed = mine.read_text() != path.read_text()
            assert changed == (str(path.relative_to(ROOT)) in files)
    for entry in make.OPEN[number]:
        file, name = entry.split()
        node = make.find((folder / file).read_text(), name)
        assert ast.get_docstring(node) and isinstance(node.body[-1], ast.Raise)

    lines = ["import flags, model, data, runpy, sys", "from lab import compare, probe, producing"]
    if number not in ("5", "11"):
        lines += [f"sys.argv = ['check.py', '{number}', '--json']",
                  "runpy.run_path('exercises/check.py', run_name='__main__')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == (len(lines) > 2), done.stderr
    if len(lines) > 2:
        told = json.loads(done.stdout)
        assert told["hint"].endswith(": not written yet") and told["points"] < told["of"]
    cut = "(cut: it is the exercise)" in (folder / "README.md").read_text()
    assert cut == (number in ("3", "4") and "reads.append" in (ROOT / "README.md").read_text())
    assert (len((folder / "lab/README.md").read_text()) < 99) == (number != "11")
    told = ["Four things", "Why do the flags still win", "Hardly ever against", "**What erodes?**",
            "We do not claim that the concept"]
    assert [any(said in (folder / "README.md").read_text() for said in told)] == [number == "11"]
    assert all(said in (ROOT / "README.md").read_text() for said in told)
    assert not [*folder.rglob("[pw]*.txt"), *folder.rglob("answers.md")]    # planted, wrong_answers
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (folder / "README.md").read_text())
    assert all((folder / link).exists() for link in links) and (folder / "LICENSE").exists()
