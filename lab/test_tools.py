"""The lab's scripts measure anew what was measured otherwise, and make no figure of nothing; and
what is behind a figure: held-out texts, the temperature, which axis is which."""
import json
from types import SimpleNamespace

import pytest
import torch

import data as D
import flags as F
from lab import concepts, draw, outside, tools, variants


def test_results_of_other_prompts_or_of_another_judge_are_measured_anew(tmp_path, monkeypatch):
    run, measured = SimpleNamespace(out=tmp_path, size=F.Size(), settings={}), []

    def main_job(run):
        measured.append((run.size.prompts, run.accuracy))
        (run.out / "results.json").write_text(json.dumps(
            {"prompts": run.size.prompts, "judge": {"accuracy": run.accuracy}}))
        (run.out / "flags.pt").touch()
    monkeypatch.setattr(F, "main_job", main_job)
    monkeypatch.setattr(F, "read_checkpoint", lambda file, settings: None)
    for run.size.prompts, run.accuracy in [(8, 0.5), (8, 0.5), (24, 0.5), (24, 0.7), (24, 0.7)]:
        assert tools.main_results(run)["prompts"] == run.size.prompts
    assert measured == [(8, 0.5), (24, 0.5), (24, 0.7)]
    (tmp_path / "results.json").write_text("")      # a broken file
    assert tools.main_results(run)["judge"] == {"accuracy": 0.7} and len(measured) == 4


def test_concepts_without_a_prompt_of_their_own_leave_a_hole_and_no_nan(tmp_path, monkeypatch):
    """"a" has the only prompt, so no conflict text is about it, and "b" is never supplied."""
    asked = {"supplied": (["x"], F.hot(2, [[0]]), lambda found, i: True),
             "conflict": (["x"], F.hot(2, [[1]]), lambda found, i: False),
             "neutral": ([""], F.hot(2, [[0]]), lambda found, i: True)}
    run = SimpleNamespace(
        out=tmp_path, size=F.Size(prompts=8), asked=asked, judge=lambda texts: [[0] for _ in texts],
        train=[], data=SimpleNamespace(
            concepts=["a", "b"], test=[D.Example("x", "y", ("a",), True)]))
    monkeypatch.setattr(F, "train_all", lambda run: ({"flags": None}, None))
    monkeypatch.setattr(F, "ask", lambda run, model, key: (["text"], None))
    assert concepts.job(run, None) == {"mean of the concepts": {}}
    table = json.loads((tmp_path / "concepts.json").read_text())
    assert table["a"]["supplied"]["mean"] == 1 and table["b"]["supplied"] is None


def test_other_text_of_which_nothing_is_held_out_is_refused(tmp_path, monkeypatch):
    empty = SimpleNamespace(test=[])
    monkeypatch.setattr(D, "load", lambda other, most, seed: empty)
    run = SimpleNamespace(seed=1, size=F.Size(), tok=None, data=SimpleNamespace(concepts=[]),
                          flags=F.Flags(1, 0, 2))
    with pytest.raises(D.Stop, match="some.jsonl: no text of it is held out"):
        outside.job(run, SimpleNamespace(other="some.jsonl"))


def test_the_judge_is_tried_on_held_out_texts(tmp_path, monkeypatch):
    asked, whole = [], D.load("stories", 4, 1, 2000)
    monkeypatch.setattr(D, "make_judge", lambda data, counted: lambda texts: asked.extend(
        text.strip() for text in texts) or [[0] for _ in texts])
    options = f"--size tiny --seed 1 --set stories=2000 --out {tmp_path}"
    F.prepare(F.parser().parse_args(options.split()))
    assert asked and set(asked) <= {e.text for e in whole.test}
    assert not set(asked) & {e.text for e in whole.train}


def test_texts_are_written_at_temperature_08_with_the_seed(monkeypatch):
    got = {}

    class Model:
        def generate(self, ids, context, edit, temperature, generator, stop, steps):
            got.update(temperature=temperature, seed=generator.initial_seed(), stop=stop)
            return ids
    run = SimpleNamespace(seed=7, size=F.Size(), tok=D.train_bpe(["a b"], 300))
    assert F.continue_texts(run, Model(), ["a", "b"]) == ["a", "b"]
    assert got == {"temperature": 0.8, "seed": 7, "stop": run.tok.end}


def test_a_row_of_the_matrix_is_a_flag_and_a_column_a_concept(monkeypatch):
    """Flag 0 makes texts of concept 1 and 1 of 1 and 2 and 2 makes nothing."""
    run = SimpleNamespace(asked={"neutral": (["", "", ""], torch.eye(3), None)}, judge=json.loads,
                          data=SimpleNamespace(concepts=["a", "b", "c"]))
    monkeypatch.setattr(F, "ask", lambda run, model, key: ("[[1, 1], [1, 2, 1, 1], []]", None))
    assert draw.matrix(run, None).tolist() == [[0, 1, 0], [0, 0.75, 0.25], [0, 0, 0]]


def test_no_second_lambda_without_a_first():
    run = SimpleNamespace(size=F.Size(weight=0.0), flags=F.Flags(1, 0, 2))
    variants.method(run, hold=True)
    with pytest.raises(D.Stop, match="weight=0 leaves no flag loss"):
        variants.method(run, weight2=6.0)
