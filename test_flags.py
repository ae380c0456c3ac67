"""Tests of the mechanism, the data and the command line. Offline; training is `--size tiny`."""
import dataclasses
import json
import math
import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch

import data as D
import flags as F
from model import GPT, Cache, Config, sample

K, C, L = 3, 16, 4
FLAGS = F.Flags(layer=2, dims=[13, 14, 15])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=50, context=40, n_layer=L, n_head=2, n_embd=C)).eval()
    for p in model.parameters():        # large weights, so that every channel matters
        torch.nn.init.normal_(p, std=0.5)
    return model


def streams(model, idx, edit=None):
    """The residual stream after each block (and its edit): a list of (B, T, C)."""
    seen = []

    def spy(layer, x, pos):
        x = edit(layer, x, pos) if edit else x
        seen.append(x)
        return x
    with torch.no_grad():
        model(idx, spy)
    return seen


# ---------------------------------------------------------------------------- the edit

def test_steering_changes_exactly_the_flags(model):
    idx, start = torch.randint(50, (2, 9)), torch.tensor([3, 6])
    values = torch.tensor([[1., 0., 1.], [0., 1., 0.]])
    free, set_ = streams(model, idx), streams(model, idx, F.steer(FLAGS, C, (start, values)))
    assert torch.equal(free[0], set_[0])                    # layer 1 is before k = 2: bit-equal
    at_k = set_[1]
    for b in range(2):
        assert torch.equal(at_k[b, start[b]:, 13:], values[b].expand(9 - start[b], K))
        assert torch.equal(at_k[b, :start[b]], free[1][b, :start[b]])
    assert torch.equal(at_k[..., :13], free[1][..., :13])   # at k nothing else has changed yet
    for layer in (2, 3):                                    # later layers are written again ...
        assert torch.equal(set_[layer][0, 3:, 13:], values[0].expand(6, K))
        assert not torch.allclose(set_[layer][0, 3:, :13], free[layer][0, 3:, :13])     # ... and read
        assert torch.equal(set_[layer][0, :3], free[layer][0, :3])      # causal: the past stays


def test_writing_back_the_models_own_flags_changes_nothing(model):
    idx = torch.randint(50, (1, 9))
    own = [x[..., FLAGS.dims] for x in streams(model, idx)]

    def rewrite(layer, x, pos):
        for t in range(9):
            edit = F.steer(FLAGS, C, (torch.tensor([t]), own[layer - 1][:, t]))
            edit(FLAGS.layer, x, pos)       # settles which positions are written
            x = edit(layer, x, pos)
        return x
    with torch.no_grad():
        assert torch.equal(model(idx, rewrite), model(idx))


def test_flags_switch_in_mid_text(model):
    idx, a, b = torch.randint(50, (1, 8)), torch.tensor([[1., 0., 0.]]), torch.tensor([[0., 0., 1.]])
    edit = F.steer(FLAGS, C, (torch.tensor([2]), a), (torch.tensor([5]), b))
    for x in streams(model, idx, edit)[1:]:
        assert torch.equal(x[0, 2:5, 13:], a.expand(3, K)) and torch.equal(x[0, 5:, 13:], b.expand(3, K))


def test_scattered_dims(model):
    flags = F.Flags(1, [7, 0, 4])
    x = streams(model, torch.randint(50, (1, 4)),
                F.steer(flags, C, (torch.tensor([0]), torch.tensor([[1., 2., 3.]]))))[0]
    assert x[0, :, 7].eq(1).all() and x[0, :, 0].eq(2).all() and x[0, :, 4].eq(3).all()


# ---------------------------------------------------------------------------- decoding

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
SET = torch.eye(3) * 3


def steered(prompts):
    start = torch.tensor([len(p) - 1 for p in prompts])
    return F.steer(FLAGS, C, (start, SET[:len(prompts)]))


def uncached(model, prompt, n, edit, temperature, generator):
    """What `generate` must agree with: no cache, no batch, no padding."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), edit)[:, -1]
        ids.append(int(sample(logits, temperature, None, generator)))
    return ids[len(prompt):]


@pytest.mark.parametrize("set_", [False, True])
def test_cached_ragged_decoding_equals_uncached(model, set_):
    together = model.generate(PROMPTS, 20, steered(PROMPTS) if set_ else None, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        edit = F.steer(FLAGS, C, (torch.tensor([len(prompt) - 1]), SET[b:b + 1])) if set_ else None
        assert together[b] == uncached(model, prompt, 20, edit, 0, None)


@pytest.mark.parametrize("set_", [False, True])
def test_cached_sampling_equals_uncached(model, set_):
    edit = steered(PROMPTS[:1]) if set_ else None
    assert (model.generate(PROMPTS[:1], 30, edit, 0.8, generator=F.rng(1))[0]
            == uncached(model, PROMPTS[0], 30, edit, 0.8, F.rng(1)))


def test_steering_reaches_every_decoded_token(model):
    edit, written = steered(PROMPTS), {}

    def spy(layer, x, pos):
        x = edit(layer, x, pos)
        for b in range(3):
            for t in range(x.size(1)):
                written[b, layer, int(pos[b, t])] = x[b, t, 13:].tolist() == SET[b].tolist()
        return x
    model.generate(PROMPTS, 12, spy, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        last = len(prompt) - 1
        for layer in (2, 3, 4):
            assert all(written[b, layer, t] for t in range(last, last + 12))
            assert not any(written[b, layer, t] for t in range(last))
        assert not any(written[b, 1, t] for t in range(last + 12))


def test_generation_stops_and_fits(model):
    free = model.generate(PROMPTS, 20, temperature=0)
    stop = free[0][5]
    for row, whole in zip(model.generate(PROMPTS, 20, temperature=0, stop=stop), free):
        assert row == (whole[:whole.index(stop)] if stop in whole else whole)
    assert len(model.generate([[1] * 38], 99)[0]) == 3      # 38 + 2 are read, the last is only written
    for bad in ([], [1] * 41):
        with pytest.raises(ValueError, match="1 to 40"):
            model.generate([bad], 3)


def test_top_k_and_sampling_follow_the_logits():
    logits = torch.tensor([[0., 1., 2., 3.]]).expand(4000, 4)
    drawn = sample(logits, 1.0, None, F.rng(0)).flatten().bincount(minlength=4) / 4000
    assert torch.allclose(drawn, logits[0].softmax(0), atol=0.04)       # 5 standard errors
    assert set(sample(logits, 1.0, 2, F.rng(0)).flatten().tolist()) == {2, 3}


# ---------------------------------------------------------------------------- the flag loss

def hand_made():
    """One sequence of four positions: prompt, last of prompt, text, padding."""
    targets = torch.tensor([[-100, 5, 6, -100]])
    return D.Batch(torch.zeros(1, 4, dtype=torch.long), targets, torch.tensor([[1., 0., 0.]]))


def test_flag_loss_against_a_hand_computed_example():
    x = torch.zeros(1, 4, C)
    x[0, 1, 13:] = torch.tensor([0.5, 0.0, 0.0])    # (0.5 - 1)^2           = 0.25
    x[0, 2, 13:] = torch.tensor([1.0, 2.0, 0.0])    # (2 - 0)^2             = 4
    x[0, 0] = x[0, 3] = 99.0                        # no flag positions: they must not count
    x[..., :13] = 99.0                              # no flags: nor must these
    edit, loss = F.install(FLAGS, lambda step: 0.0, 0, C)(0, hand_made())
    for layer in (1, 2, 3):                         # layer 1 is before k
        assert torch.equal(edit(layer, x if layer < 3 else torch.zeros_like(x), None),
                           x if layer < 3 else torch.zeros_like(x))
    # layer 2: 4.25 over 2 positions x 3 flags; layer 3: all zero, so two misses of 1 over 6
    assert loss().item() == pytest.approx((4.25 / 6 + 2 / 6) / 2)


def test_supplied_flags_are_read_before_they_are_overwritten():
    x = torch.randn(1, 4, C, requires_grad=True)
    edit, loss = F.install(FLAGS, lambda step: 1.0, 0, C)(0, hand_made())
    after = edit(2, x, None)
    assert torch.equal(after[0, 1:3, 13:], torch.tensor([[1., 0., 0.]]).expand(2, 3))
    assert torch.equal(after[0, [0, 3]], x[0, [0, 3]]) and torch.equal(after[..., :13], x[..., :13])
    f = x[0, 1:3, 13:]
    assert loss().item() == pytest.approx(((f - torch.tensor([1., 0., 0.])) ** 2).mean().item())
    after.sum().backward(retain_graph=True)         # what was overwritten gets no LM gradient ...
    assert x.grad[0, 1:3, 13:].eq(0).all() and x.grad[0, 1:3, :13].eq(1).all()
    loss().backward()                               # ... but still learns to be right
    assert x.grad[0, 1:3, 13:].ne(0).all()


def test_the_share_of_supplied_sequences_is_p():
    n = 4000
    batch = D.Batch(torch.zeros(n, 1, dtype=torch.long), torch.zeros(n, 1, dtype=torch.long),
                    torch.ones(n, K))
    arm = F.install(FLAGS, lambda step: 0.7, 0, C)
    share = arm(0, batch)[0](2, torch.zeros(n, 1, C), None)[:, 0, 13].mean().item()
    assert share == pytest.approx(0.7, abs=0.04)    # 5 standard errors
    again = arm(0, batch)[0](2, torch.zeros(n, 1, C), None)
    other = arm(1, batch)[0](2, torch.zeros(n, 1, C), None)
    assert again[:, 0, 13].mean().item() == share and not torch.equal(again, other)


# ---------------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def stories():
    return D.load("stories")


@pytest.fixture(scope="module")
def tok(stories):
    return D.train_bpe((f"{e.prompt} {e.text}" for e in stories.train[:3000]), 700)


def test_labels_and_masks_against_a_hand_labelled_example(tok):
    examples = [D.Example("Mia slept.", "A crab came.", ("sea",)), D.Example("", "Snow!", ("snow", "sea"))]
    rows = D.encode(examples, tok, ["farm", "sea", "snow"], 64)
    prompt, text = tok.encode("Mia slept."), tok.encode(" A crab came.")
    assert rows[0] == ([tok.end] + prompt, text + [tok.end], (0.0, 1.0, 0.0))
    assert rows[1].prompt == [tok.end] and rows[1].label == (0.0, 1.0, 1.0)
    batch = D.pad(rows)
    assert batch.idx[0].tolist() == [tok.end] + prompt + text
    assert batch.targets[0].tolist() == [-100] * len(prompt) + text + [tok.end]
    n = len(rows[1].text)
    assert batch.targets[1, :n].tolist() == tok.encode(" Snow!") + [tok.end]
    assert (batch.targets[1, n:] == -100).all() and (batch.idx[1, n:] == tok.end).all()
    assert batch.y.tolist() == [[0, 1, 0], [0, 1, 1]]


def test_texts_are_cut_and_prompts_refused(tok):
    row, = D.encode([D.Example("Mia slept.", "A crab came. " * 9, ("sea",))], tok, ["sea"], 12)
    assert len(row.prompt) + len(row.text) - 1 == 12 and row.text[-1] != tok.end
    with pytest.raises(ValueError, match="context of 4"):
        D.encode([D.Example("Mia and Ben slept.", "x", ("sea",))], tok, ["sea"], 4)


def test_batches_are_pure_functions_and_cover_the_epoch(stories, tok):
    rows = D.encode(stories.train[:1000], tok, stories.concepts, 128)
    one, two = D.batch(rows, 7, 32, 1), D.batch(rows, 7, 32, 1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one.idx[:, :9], D.batch(rows, 7, 32, 2).idx[:, :9])
    seen = [tuple(row[row != tok.end].tolist()) for step in range(31)
            for row in D.batch(rows, step, 32, 1).idx]
    assert len(set(seen)) >= 985                    # 31 x 32 = 992 rows, a few texts may be equal
    bare = D.batch(rows, 7, 32, 1, no_prompt=1.0)
    assert (bare.targets[:, 0] >= 0).all()          # the text begins at once


def test_every_word_of_a_story_says_what_it_is_about(stories):
    assert len(stories.concepts) == 16 and len(set(stories.words.values())) == 16
    cued = 0
    for e in stories.train[:4000]:
        told = D.content(e.text, stories.words)
        assert set(told) == set(e.concepts)
        assert len(set(told[:1] + told)) == len(e.concepts)
        assert set(D.content(e.prompt, stories.words)) in (set(), set(e.concepts))
        cued += bool(D.content(e.prompt, stories.words))
        assert 2 <= len(re.findall(r"[.!?](?: |$)", e.text)) <= 5
    assert 0.55 < cued / 4000 < 0.75
    number = [len(e.concepts) for e in stories.train]
    assert set(number) == {1, 2, 3}


def test_stories_are_grammatical(stories):
    for e in stories.train[:6000]:
        for word, article in ((w, a) for a, w in re.findall(r"\b([Aa]n?) (\w+)", e.prompt + " " + e.text)):
            vowel = word[0] in "aeiou" and not word.startswith(("uni", "uku"))
            assert (article.lower() == "an") == vowel, e.text
        sentences = re.split(r"(?<=[.!?]) ", e.text)
        assert all(s[0].isupper() and s[-1] in ".!?" for s in sentences), e.text
        assert "  " not in e.text and " ." not in e.text


def test_nothing_of_a_test_prompt_was_trained_on(stories):
    assert not {e.prompt for e in stories.train} & {e.prompt for e in stories.test}
    assert not {e.text for e in stories.train} & {e.text for e in stories.test}
    assert D.load("stories", seed=7).train != stories.train
    assert D.load("stories").test == stories.test


def test_bpe_round_trips_any_bytes(tok):
    chance = random.Random(0)
    for _ in range(300):
        text = bytes(chance.randrange(256) for _ in range(chance.randrange(40))).decode("latin-1")
        text += chance.choice(["", "\U0001f600 é", "<|end|>", "   \n\t", "don't", "漢字"])
        ids = tok.encode(text)
        assert tok.decode(ids) == text and tok.end not in ids
    assert {tok.n_vocab - 1} == {tok.end} and tok.n_vocab == 700


def test_bpe_merges_the_most_frequent_pair_first():
    tok = D.train_bpe(["aab aab ab"], 256 + 2 + 1)
    # " a" + "b": "ab" stands three times, then "a" + "ab" twice
    assert [len(tok.encode(text)) for text in ("ab", "aab", "ba")] == [1, 1, 2]


WORDNET = """  1 This is the licence, indented.
00001740 05 n 02 poodle_dog 0 barker 0 001 @ 00001930 n 0000 | a curly dog; "the poodle barked"
00001930 20 n 01 rose 0 000 | a thorny shrub
00002000 03 n 01 entity 0 000 | not one of the sixteen
"""


def test_wordnet_reader(tmp_path, monkeypatch):
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text(WORDNET)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setattr(D, "Path", lambda *p: tmp_path / "none" if p == ("/usr/share/wordnet",) else Path(*p))
    monkeypatch.setattr(D.Path, "home", lambda: tmp_path / "home", raising=False)
    data = D.load("wordnet")
    assert sorted(data.train + data.judge + data.test, key=lambda e: e.prompt) == [
        D.Example("poodle dog:", "a curly dog", ("animal",)), D.Example("rose:", "a thorny shrub", ("plant",))]


def lines(*items):
    return "\n".join(i if isinstance(i, str) else json.dumps(i) for i in items).encode()


def many(n=60, concepts=("cat", "dog")):
    return [{"prompt": f"p{i}", "text": f"text {i}", "concepts": [concepts[i % len(concepts)]]}
            for i in range(n)]


@pytest.mark.parametrize("content, message", [
    (b"", "0 examples"),
    (b"\xff\xfe{", "line 1: not JSON in UTF-8"),
    (lines(*many(3), "{oops"), "line 4: not JSON"),
    (lines([1]), "line 1: not an object"),
    (lines({"prompt": "a", "concepts": ["b"]}), "line 1: 'text' must be"),
    (lines({"prompt": 3, "text": "a", "concepts": ["b"]}), "'prompt' must be a string"),
    (lines({"prompt": "a", "text": " ", "concepts": ["b"]}), "'text' must be a non-empty"),
    (lines({"prompt": "a", "text": "b", "concepts": "b"}), "must be a list"),
    (lines({"prompt": "a", "text": "b", "concepts": []}), "one or more"),
    (b'{"prompt": "\\ud800", "text": "b", "concepts": ["c"]}', "surrogate"),
    (lines(*many(60, ("cat",))), "at least 2 concepts"),
    (lines(*many(60, [f"c{i}" for i in range(20)])), "use --flags 20"),
    (lines(*many(2)), "no example"),
])
def test_bad_jsonl_is_named_by_file_and_line(tmp_path, content, message):
    file = tmp_path / "my.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        D.load(str(file))
    assert message in str(error.value) and "my.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_good_jsonl_with_a_mark_crlf_and_doubles(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + lines(*many(), *many(9)).replace(b"\n", b"\r\n\r\n"))
    data = D.load(str(file))
    assert len(data.train + data.judge + data.test) == 60 and data.concepts == ["cat", "dog"]


def test_random_bytes_never_crash_the_reader(tmp_path):
    chance, file = random.Random(1), tmp_path / "my.jsonl"
    good = lines(*many(4))
    for _ in range(300):
        noise = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            noise[chance.randrange(len(noise))] = chance.randrange(256)
        file.write_bytes(bytes(noise))
        with pytest.raises(ValueError, match="my.jsonl"):   # four lines never fill three splits
            D.load(str(file))


# ---------------------------------------------------------------------------- measurements

def test_judges():
    data = D.Data("x", ["cat", "dog"], [], [], [], {"cat": "cat", "purred": "cat", "dog": "dog"})
    assert F.word_judge(data)(["The cat purred at a dog.", "No."]) == [[0, 0, 1], []]
    assert F.about([0, 0, 1], 0) and not F.about([0, 1], 0) and not F.about([], 0)
    data.judge = [D.Example("", f"{word} number {i}", (word,)) for i in range(30) for word in ("cat", "dog")]
    assert F.bag_of_words_judge(data)(["a dog", "some cat 99"]) == [[1], [0]]


def test_statistics_by_hand():
    assert F.auc(torch.tensor([1., 2., 3., 3.]), torch.tensor([0., 1., 0., 1.])) == pytest.approx(2.5 / 4)
    stat = F.stat([0, 1] * 200)
    assert stat["mean"] == 0.5 and stat["n"] == 400
    assert stat["low"] == pytest.approx(0.451, abs=0.02) and stat["high"] == pytest.approx(0.549, abs=0.02)
    assert F.stat([]) is None
    assert F.hot(4, [1, 2], [3, 0]).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


# ---------------------------------------------------------------------------- training and running

def tiny(tmp_path, *more):
    return ["--size", "tiny", "--out", str(tmp_path / "run"), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole `--size tiny` run: its folder and its results."""
    folder = tmp_path_factory.mktemp("finished")
    assert F.main(tiny(folder)) == 0
    return folder, json.loads((folder / "run" / "results.json").read_text())


def test_a_tiny_run_end_to_end(finished):
    folder, results = finished
    assert {"size", "data", "seed", "device", "torch", "commit", "parameters", "seconds", "threads",
            "tokens_per_second", "loss", "read", "steer", "reliance", "judge", "trajectory",
            "samples"} <= set(results)
    assert set(results["steer"]) == {"neutral", "conflict", "kept", "suppress", "compose2", "compose3",
                                     "switch", "leak", "nll_gap", "distinct2"}
    assert {name: set(views) for name, views in results["reliance"].items()} == {
        "base": {"intact", "blank"}, "control": {"intact", "blank"},
        "flags": {"intact", "supplied", "blank"}}
    for leaf in (results["read"]["auc"], results["steer"]["conflict"], results["reliance"]["base"]["blank"]):
        assert set(leaf) == {"mean", "low", "high", "n"} and leaf["low"] <= leaf["mean"] <= leaf["high"]
    assert {point["stage"] for point in results["trajectory"]} == {1, 2}
    assert set(results["trajectory"][0]) == {"step", "stage", "lm_loss", "flag_loss", "intact", "blank",
                                             "conflict"}
    assert results["loss"]["control"] < results["loss"]["base"] - 0.2   # 1.1 nats here: it learns
    assert results["trajectory"][-1]["flag_loss"] < 0.2                 # 0.07 here, 1 untrained
    for name in ("erosion.png", "matrix.png", "tokens.png", "log.jsonl", "flags.pt", "base.pt", "control.pt"):
        assert (folder / "run" / name).stat().st_size > 1000


def test_a_finished_run_is_taken_up_and_says_what_differs(finished, capsys):
    folder, _ = finished
    assert F.main(tiny(folder, "--seed", "1")) == 2
    error = capsys.readouterr().err
    assert "seed was 1337 and is now 1" in error and "--fresh" in error and error.count("\n") == 1


def test_steering_from_the_command_line(finished, capsys):
    folder, _ = finished
    assert F.main(tiny(folder, "--steer", "Mia dreamed of the moon.", "--on", "sea", "--off", "space")) == 0
    shown = capsys.readouterr().out
    assert "the model's own flags" in shown and "flags set: sea" in shown and "\033" not in shown
    assert F.main(tiny(folder, "--steer", "--on", "farm")) == 0
    assert "prompt: (none)" in capsys.readouterr().out


def test_the_interactive_loop(finished, capsys, monkeypatch):
    folder, _ = finished
    typed = iter(["Mia woke up early.", "+sea -space", "+nothing", "free", "word " * 200, "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert F.main(tiny(folder, "--steer")) == 0
    shown = capsys.readouterr().out
    assert "flags set: sea" in shown and "there is no flag 'nothing'" in shown and "shorten it" in shown


@pytest.mark.parametrize("more, message", [
    (["--steer", "x", "--on", "dragons"], "there is no flag 'dragons'"),
    (["--steer", "x", "--on", "sea", "--off", "sea"], "both on and off"),
    (["--steer", "word " * 200], "shorten it"),
])
def test_bad_steering(finished, capsys, more, message):
    assert F.main(tiny(finished[0], *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("more, message", [
    (["--steer", "x"], "holds no finished run"),
    (["--on", "sea"], "go with --steer"),
    (["--data", "nonsense"], "no data called"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--flags", "1"], "at least 2"),
])
def test_bad_command_lines(tmp_path, capsys, more, message):
    assert F.main(tiny(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [["--size", "huge"], ["--seed", "-1"], ["--seed", "x"], ["--flags", "x"]])
def test_bad_options(more, capsys):
    with pytest.raises(SystemExit) as stop:
        F.main(more)
    assert stop.value.code == 2


@pytest.fixture(scope="module")
def prepared():
    return F.prepare(F.parser().parse_args(["--size", "tiny"]))


@pytest.fixture
def train_tiny(prepared):
    return lambda folder, **changes: train(prepared, folder, **changes)


def train(prepared, folder, **changes):
    """The weights after 12 steps of a base and 12 of its flags, without the measurements."""
    size = dataclasses.replace(prepared.size, **changes)
    run = dataclasses.replace(prepared, out=folder, size=size, later={"base": 0, "flags": 0})
    with F.locked(run):
        model = F.new_model(run)
        F.fit(run, "base", model, 12)
        arm = F.install(run.flags, lambda step: 0.5, run.seed, run.size.width)
        F.fit(run, "flags", model, 12, arm, lambda step: 2)
    return model.state_dict()


def equal(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def test_measuring_does_not_change_training(train_tiny, tmp_path):
    assert equal(train_tiny(tmp_path / "a", every=100), train_tiny(tmp_path / "b", every=3))


def test_a_killed_run_goes_on_to_the_same_bits(train_tiny, tmp_path, monkeypatch):
    whole = train_tiny(tmp_path / "whole")
    monkeypatch.setattr(F, "CHECKPOINT_SECONDS", 0)
    real, real_replace, chance = F.lm_loss, os.replace, random.Random(0)

    def die_sometimes(*args):
        if chance.random() < 0.1:
            raise RuntimeError("killed")
        return real(*args)

    def die_in_a_write(*args):
        if chance.random() < 0.1:
            raise RuntimeError("killed")
        return real_replace(*args)
    monkeypatch.setattr(F, "lm_loss", die_sometimes)
    monkeypatch.setattr(os, "replace", die_in_a_write)
    deaths = 0
    while True:
        try:
            assert equal(train_tiny(tmp_path / "often"), whole)
            break
        except RuntimeError:
            deaths += 1
            assert deaths < 100
    assert deaths > 2


def test_sigterm_stops_after_the_step_and_says_so(train_tiny, tmp_path, monkeypatch):
    whole, real, calls = train_tiny(tmp_path / "whole"), D.batch, []

    def batch(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(D, "batch", batch)
    with pytest.raises(F.Stop, match="stopped at step 5 of base; the same command goes on") as stop:
        train_tiny(tmp_path / "run")
    assert stop.value.status == 128 + signal.SIGTERM and len(calls) == 5
    assert equal(train_tiny(tmp_path / "run"), whole)


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(F, "CHECKPOINT_SECONDS", 0)
    real, calls = F.lm_loss, []

    def lm_loss(*args):
        calls.append(0)
        return real(*args) * (math.nan if len(calls) == 6 else 1)
    monkeypatch.setattr(F, "lm_loss", lm_loss)
    with pytest.raises(F.Stop, match=r"base, step 5: the loss is nan.*base.pt holds step 5"):
        train_tiny(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "base.pt", weights_only=True)
    assert saved["step"] == 5 and all(p.isfinite().all() for p in saved["model"].values())


@pytest.mark.parametrize("spoil", [lambda good: good[:len(good) // 2], lambda good: b"",
                                   lambda good: b"cposix\nsystem\n(S'touch pwned'\ntR."])
def test_a_spoilt_checkpoint_is_one_line(train_tiny, tmp_path, spoil, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_tiny(tmp_path / "run")
    file = tmp_path / "run" / "base.pt"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(F.Stop, match="no whole checkpoint") as stop:
        train_tiny(tmp_path / "run")
    assert "\n" not in str(stop.value) and not (tmp_path / "pwned").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    F.save(tmp_path / "x.pt", {"a": 1})

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(F.Stop, match="No space left"):
        F.save(tmp_path / "x.pt", {"a": 2})
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_two_runs_into_one_folder(prepared, tmp_path, capsys):
    with F.locked(dataclasses.replace(prepared, out=tmp_path / "run")):
        assert F.main(tiny(tmp_path)) == 2
    assert "another run" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "run").write_text("a file, not a folder")
    assert F.main(tiny(tmp_path)) == 2
    assert "can't write" in capsys.readouterr().err
