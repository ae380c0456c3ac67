"""The course is honest: originals pass, wrong answers fail with a hint, starters can be made."""
import ast
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flags as F

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "exercises").exists(), reason="exercises/ is not here")
sys.path.insert(0, str(ROOT / "exercises"))
check, make = (importlib.import_module(name) if (ROOT / "exercises").exists() else None for name in ("check", "make"))

# For each exercise: an answer that is plausible and wrong, as changes of the original (old, new, ...).
WRONG = {
    "1": [
        (">= start", "> start"), ("pos >=", "torch.arange(x.size(1), device=x.device)[None] >="),
        ("flags.height * values", "values"), ("layer >= flags.layer", "layer == flags.layer"),
        ("layer >= flags.layer", "layer > flags.layer"), (">= start", "== start"), ("pos >= start", "pos <= start"),
        ("start.to(x.device)[:, None]", "start.to(x.device)[0]"),
        ("torch.where(on, chosen, x[..., flags.slice])", "x[..., flags.slice] + on * chosen"),
        ("on = (pos", "on = (values.sum(1)[:, None, None] > 0) * (pos"), ("layer >= flags.layer", "layer >= 0"),
        ("= torch.where(on, chosen, x[..., flags.slice])", "= torch.where(on & (chosen > 0), chosen, x[..., flags.slice])"),
        ("x[..., flags.slice] = torch.where(on, chosen, x[..., flags.slice])", "x[:] = torch.where(on, chosen.mean(), x)"),
        ("return edit", "return lambda layer, x, pos: edit(layer + 1, x, pos)")],
    "2": [
        ("targets[b, len(row.prompt) - 1:length] = row.text", "targets[b, len(row.prompt):length] = row.text[:-1]"),
        ("targets[b, len(row.prompt) - 1:length] = row.text", "targets[b, :length] = (row.prompt + row.text)[1:]"),
        ("targets[b, len(row.prompt) - 1:length] = row.text",
         "targets[b, len(row.prompt):length] = idx[b, len(row.prompt):length]"),
        ("targets[b, len(row.prompt) - 1:length] = row.text", "targets[b, len(row.prompt) - 1:length - 1] = row.text[:-1]"),
        ("-(-max(lengths) // 8) * 8", "max(lengths)"), ("-(-max(lengths) // 8) * 8", "(max(lengths) // 8 + 1) * 8"),
        ("-(-max(lengths) // 8) * 8", "max(lengths) // 8 * 8 or 8"), ("rows[0].prompt[0]", "0"),
        ("rows[0].prompt[0]", "rows[-1].prompt[0]"), ("torch.zeros(len(rows))", "torch.rand(len(rows))"),
        ("torch.zeros(len(rows))", "torch.ones(len(rows))"), ("torch.float32", "torch.float64"),
        ("np.full_like(idx, -100)", "np.zeros_like(idx)"), ("dtype=np.int64", "dtype=np.int32"),
        ("idx[b, :length] = (row.prompt + row.text)[:-1]", "idx[b, -length:] = (row.prompt + row.text)[:-1]")],
    "3": [
        ("draw < p", "draw <= p"), ("draw < p", "draw > p"), ("draw < p", "draw < 1 - p"),
        ("draw < p", "torch.rand_like(draw) < p"), ("on & (draw < p)", "(draw < p)"), ("on & (draw < p)", "on | (draw < p)"),
        ("flags.height * y.to(x.dtype)", "y.to(x.dtype)"),
        ("            x[..., flags.slice] = ", "            if layer == flags.layer: x[..., flags.slice] = "),
        ("layer >= flags.layer", "layer > flags.layer"), ("layer >= flags.layer", "layer >= 1"),
        ("torch.where(write, flags.height", "torch.where(write & (y > 0), flags.height"),
        ("on = (targets >= 0)", "on = (targets > -101)"), ("x[..., flags.slice] = torch.where", "x[..., :y.size(-1)] = torch.where"),
        ("write = on & (draw < p)[:, None, None]", "write = on & (draw < p).any()"),
        ("torch.where(write, flags.height * y.to(x.dtype), own)", "own + write * flags.height * y.to(x.dtype)")],
    "4": [
        ("            reads.append(own / flags.height)            # ... so keep a copy, then overwrite it\n", "",
         "own)\n        return x ", "own)\n            reads.append(x[..., flags.slice] / flags.height)\n        return x "),
        ("reads.append(own / flags.height)", "reads.append(own)"), ("own / flags.height", "own.detach() / flags.height"),
        ("reads.append(own / flags.height)", "reads.append(own); own = own / flags.height"),
        ("errors.sum() / (len(reads) * on.sum() * y.size(-1))", "errors.mean()"),
        ("** 2 * on", "** 2"), ("(len(reads) * on.sum() * y.size(-1))", "(on.sum() * y.size(-1))"),
        ("(len(reads) * on.sum() * y.size(-1))", "(len(reads) * on.sum())"), ("** 2 * on", ".abs() * on"),
        ("errors.sum() / (len(reads) * on.sum() * y.size(-1))", "(errors.mean(-1).sum(2) / on.sum((1, 2))).mean()"),
        ("reads.append(own / flags.height)", "reads or reads.append(own / flags.height)"),
        ("reads.append(own / flags.height)", "reads[:] = [own / flags.height]"),
        ("y, reads = y[:, None], []", "y, reads = y[:, None], install.__dict__.setdefault('reads', [])"),
        ("* on                 #", "* (on & ~write)                 #"), ("* on                 #", "* on * (y > 0)                 #"),
        ("torch.where(write, flags.height * y.to(x.dtype), own)",
         "torch.where(write, own + (flags.height * y.to(x.dtype) - own).detach(), own)"),
        ("torch.stack(reads) - y", "torch.stack(reads).sigmoid() - y")],
    "6": [
        ("> negative", "< negative"), ("> negative", ">= negative"), ("+ 0.5 * (", "+ 1.0 * ("),
        ("+ 0.5 * (positive[:, None] == negative)", ""), ("above.mean().item()", "above.mean()"),
        ("above.mean()", "(1 - above).mean()"), ("above = (positive[:, None] > negative).float()",
                                                  "above = (positive.mean() > negative).float()")],
    "7": [
        ("    on = (batch.targets >= 0).float()", "    on = torch.ones(batch.targets.shape)"), ("mean - mean.mean(0)", "mean"),
        ("total += batch.y.T @ (x * on[..., None]).sum(1)", "total += batch.y.T @ (x * on[..., None]).sum(1) / on.sum()"),
        ("total += batch.y.T @ (x * on[..., None]).sum(1)",
         "total += batch.y.T @ ((x * on[..., None]).sum(1) / on.sum(1, keepdim=True))",
         "number += (batch.y.T @ on.sum(1))[:, None]", "number += batch.y.sum(0)[:, None]"),
        ("[run.flags.layer - 1]", "[run.flags.layer]"), ("[run.flags.layer - 1]", "[-1]"),
        ("mean - mean.mean(0)", "mean - mean.mean(1, keepdim=True)"), ("* on[..., None]).sum(1)", "* on[..., None]).mean(1)"),
        ("number += (batch.y.T @ on.sum(1))[:, None]", "number += on.sum()"),
        ("batch.targets >= 0", "batch.targets < 0"), ("total += batch.y.T", "total += (batch.y == batch.y.sum(1, True)).float().T")],
    "8": [
        ("F.pad((a - mean) / std, (0, 1), value=1.0)", "((a - mean) / std)"), ("penalty * torch.eye", "1e-9 * torch.eye"),
        ("penalty * torch.eye", "penalty * len(x) * torch.eye"), ("penalty * torch.eye", "1.0 * torch.eye"),
        ("(a - mean) / std", "(a - a.mean(0)) / a.std(0).clamp(min=1e-4)"), (".clamp(min=1e-4)", ""),
        ("(a - mean) / std", "(a - mean)"), ("(a - mean) / std", "a / std"), ("torch.linalg.solve(gram, x.T @ y.double())",
                                                                             "(x.T @ y.double())"),
        ("value=1.0", "value=0.0"), ("penalty * torch.eye", "penalty ** 2 * torch.eye")],
    "9": [
        ("batch.targets.clamp(min=0)", "batch.idx"), (" & (batch.y[:, None] > 0)", ""), ("layer < run.size", "layer <= run.size"),
        ("flags.layer <= layer <", "layer <"), (".strip().lower()", ".strip()"), (".strip().lower()", ".lower()"),
        ("torch.where(passes, x, x.detach())", "torch.where(passes, x.detach(), x)"), ("x.detach()", "torch.zeros_like(x)"),
        ("|= of", "= True"), ("passes[..., flags.slice] |= of", "pass"), (" & on &", " &"),
        ("not words, device", "False, device")],
    "10": [
        ("        if self.layer == 0:\n    ", ""), ("if self.layer == 0:", "if i == 0:"), ("self.length += T", "self.length += 1"),
        ("return keys[:, :, :n + T], values[:, :, :n + T]", "return values[:, :, :n + T], keys[:, :, :n + T]"),
        ("k.new_empty(B, H, self.size, D)", "k.new_empty(B, H, self.size, D, dtype=torch.float32)"),
        ("return keys[:, :, :n + T], values[:, :, :n + T]", "return keys, values"), ("[:, :, n:n + T] = k", "[:, :, n:n + T] = k.flip(2)"),
        ("(i + 1) % self.n_layer", "0"), ("i, n, (B", "self.kv = self.kv[:1] * self.n_layer; i, n, (B"),
        ("list(counts.values())", "[1] * len(counts)"),
        ("frequency[pair] == most)", "frequency[pair] >= 1)"), ("best = min(", "best = max("), ("< vocab_size - 257", "< vocab_size - 258"),
        ("regex.findall(PIECES, text)", "[text]"), ("regex.findall(PIECES, text)", "text.split()"),
        ('piece.encode("utf-8", "replace")', "map(lambda c: min(255, ord(c)), piece)"), ("if vocab_size < 257", "if vocab_size < 0"),
        ("count(i, -1)", "pass"), ("most = max(", "most = min("), ("while frequency and", "while len(frequency) > 1 and"),
        ("255 + len(merges)", "256 + len(merges)")]}


def originals(number):
    for entry in make.OPEN[number]:
        file, name = entry.split()
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        source = Path(ROOT, file).read_text()
        yield module, name, "\n".join(source.splitlines()[find_first(source, name):make.find(source, name).end_lineno])


def find_first(source, name):
    node = make.find(source, name)
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1


@pytest.mark.parametrize("number", [n for n in WRONG])
def test_originals_pass_and_wrong_answers_fail_with_a_hint(number, monkeypatch):
    torch.set_num_threads(1)
    points, total, hint = check.check(number)
    assert points == total > 2 and hint == "", hint
    for changes in WRONG[number]:
        for module, name, original in originals(number):
            if all(old in original for old in changes[::2]):
                break
        else:
            pytest.fail(f"{number}: {changes[0]!r} is not in the original")
        answer = original
        for old, new in zip(changes[::2], changes[1::2]):
            answer = answer.replace(old, new)
        ast.parse(textwrap.dedent(answer))
        *owner, leaf = name.split(".")
        target = module if not owner else getattr(module, owner[0])
        real, space = getattr(target, leaf), dict(vars(module))
        exec(textwrap.dedent(answer), space)
        monkeypatch.setattr(target, leaf, space[leaf])
        points, total, hint = check.check(number)
        monkeypatch.setattr(target, leaf, real)
        assert hint and "\n" not in hint, (number, changes)
        assert points < total


def test_there_are_enough_wrong_answers():
    assert sum(map(len, WRONG.values())) >= 90


CURVES = """
def experiment(run):
    s, points = run.size, lambda conflict, flag_loss, steps: [
        {"step": step, "stage": 1 + (step > s.produce), "intact": 1, "blank": 0, "conflict": 0.2 if step == s.produce
         else conflict, "flag_loss": flag_loss} for step in steps]
    steps = [s.produce, 40, 80, 120, s.produce + s.rely]
    curves = {"control": points(0.2, 1.0, steps), "p = 0": points(0.3, 0.1, steps), "p = 1": points(1.0, 0.1, steps)}
    %s
    return curves
"""


@pytest.mark.parametrize("change, hint", [
    ("pass", ""), ("del curves['control']", "without the control"), ("del curves['p = 0']", "two curves"),
    ("curves = {k: v[-1:] for k, v in curves.items()}", "the final point alone"),
    ("curves = {k: v[1:] for k, v in curves.items()}", "begins at the end of stage 1"),
    ("curves = {k: v[:-1] for k, v in curves.items()}", "both stages"),
    ("curves['p = 1'] = curves['p = 0']", "the flags should rule"), ("curves['p = 0'] = curves['p = 1']", "nobody is supplied"),
    ("curves['control'] = curves['p = 0']", "the control has no flag loss"),
    ("curves['p = 0'] = points(0.3, 1.0, steps)", "flags are still produced"),
    ("curves['p = 1'][0]['conflict'] = 0.9", "stage 1 is the same")])
def test_wrong_experiments_fail_with_a_hint(change, hint, monkeypatch):
    from lab import producing
    space = {}
    exec(CURVES % change, space)
    monkeypatch.setattr(producing, "experiment", space["experiment"])
    monkeypatch.setattr(F, "prepare", lambda args: SimpleNamespace(size=dataclasses.replace(
        F.SIZES["tiny"], rely=160)))
    found = check.check("5")[2]
    assert hint in found and bool(found) == bool(hint)


def test_the_open_exercise_wants_three_fresh_seeds(tmp_path):
    def folders(**more):
        for i, seed in enumerate(seeds):
            result = {"seed": seed, "steer": {"compose3": {"mean": 0.95, "n": 256}}, "parameters": 9e5,
                      "loss": {"flags": 0.70, "control": 0.70}}
            (tmp_path / str(i)).mkdir(exist_ok=True)
            (tmp_path / str(i) / "results.json").write_text(json.dumps(result | (more if i == 1 else {})))
        return [str(tmp_path / str(i)) for i in range(3)]
    hint = check.check("11", "ada", [])[2]
    seeds = json.loads(hint[hint.index("["):hint.index("]") + 1])
    assert check.check("11", "ada", folders())[2] == ""
    assert "seeds must be" in check.check("11", "eve", folders())[2]
    assert "one seed" in check.check("11", "ada", folders(loss={"flags": 0.72, "control": 0.7}))[2]
    assert "lowest" in check.check("11", "ada", folders(steer={"compose3": {"mean": 0.9, "n": 256}}))[2]
    assert "at least 256" in check.check("11", "ada", folders(steer={"compose3": {"mean": 0.95, "n": 20}}))[2]


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
    code = "import flags, model, data; from lab import compare, probe, producing"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if number not in ("5", "11"):
        done = subprocess.run([sys.executable, "exercises/check.py", number, "--json"], cwd=folder, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        told = json.loads(done.stdout)
        assert done.returncode == 1 and told["points"] < told["of"] and told["hint"] == "not written yet", done.stderr
    readme = (folder / "README.md").read_text()
    assert ("(cut: it is the exercise)" in readme) == (number in ("3", "4") and "reads.append" in (ROOT / "README.md").read_text())
