"""Tests of --init: whole runs of small real checkpoints, tokenizer files, bad folders.

    pip install transformers gguf accelerate
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data as D
import flags as F
from lab import export
from lab.test_real import GROUPED, T, jsonl_of, small, tokenizer
from model import Pretrained, load_pretrained
from test_flags import PROMPTS, one_line
POINTER = b"version https://git-lfs.github.com/spec/v1"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_whole_run(name, tmp_path, capsys):
    """On a folder that transformers wrote; what comes out loads there and can be steered there."""
    folder, out = tmp_path / "model", tmp_path / "run"
    tokenizer().save_pretrained(folder)
    small(name, 320).save_pretrained(folder)
    sets = "produce=2 rely=4 every=3 prompts=12 track=4 batch=8 layer=2".split()
    command = ["--size", "tiny", "--init", str(folder), "--data", jsonl_of(tmp_path),
               "--out", str(out), "--set", *sets]
    assert F.main(command) is None
    results = json.loads((out / "results.json").read_text())
    assert {point["stage"] for point in results["trajectory"]} == {1, 2}
    assert F.main(command + ["--steer", "On day 3", "--on", "dog"]) is None
    assert "flags set: " in capsys.readouterr().out
    start, theirs = (T.AutoModelForCausalLM.from_pretrained(at) for at in (folder, out / "model"))
    assert torch.equal(start.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    saved = torch.load(out / "flags.pt", weights_only=True)
    told = json.loads((out / "model" / "flags.json").read_text())
    assert told["concepts"] == ["cat", "dog"]
    assert told["layer"] == told["count"] == 2 and told["height"] > 0
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, saved["model"][f"model.{key}"])
    moved = folder.rename(tmp_path / "elsewhere")       # a path is not a setting, the weights are
    command[3] = f"{moved}/"
    assert F.main(command) is None
    small("gpt2" if name == "llama" else "llama", 320).save_pretrained(moved)
    assert F.main(command) == 2
    one_line(capsys, "another base model")


def test_two_processes_save_what_one_saves(tmp_path):
    tokenizer().save_pretrained(tmp_path / "model")
    small("llama", 320).save_pretrained(tmp_path / "model")
    for N in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={N}"]
        done = subprocess.run(
            [sys.executable, *(torchrun if N > 1 else []), "-m", "lab.large", "--size", "tiny",
             "--init", str(tmp_path / "model"), "--data", jsonl_of(tmp_path), "--micro", "3",
             "--out", str(tmp_path / str(N)), "--set", "produce=2", "rely=4", "every=3",
             "prompts=12", "track=4", "batch=8", "layer=3"],
            text=True, capture_output=True, cwd=Path(F.__file__).parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (T.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
                for name in "12")
    assert one.keys() == two.keys()
    start = T.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=3e-3)
        upper = any(f"layers.{i}." in key for i in (2, 3))      # top = 2 of 4 blocks
        assert torch.equal(value, start[key]) == (not upper)


def test_the_schedule_of_real_text_and_of_a_gpu(tmp_path, monkeypatch):
    data, folder, out = jsonl_of(tmp_path, 600), tmp_path / "model", str(tmp_path / "out")
    tokenizer().save_pretrained(folder)
    small("llama", 320, num_hidden_layers=6, max_position_embeddings=256).save_pretrained(folder)
    prepare = lambda *more: F.prepare(F.parser().parse_args(["--data", data, "--out", out, *more]))
    run, names = prepare(), "rely batch lr top layer muon weight no_prompt supply base wean".split()
    n = round(len(run.data.train) / 12)                     # ten epochs of 128
    assert [*map(vars(run.size).get, names)] == [n, 128, 0.032, 0, 2, 3, 10, 0.5, 0.9, 48, 0.2]
    twice = [e._replace(prompt=f"{e.prompt} {i}") for e in run.data.train for i in (0, 1)]
    assert F.for_real_text(run.size, twice).rely == n       # no more texts to learn
    more = prepare("--data", jsonl_of(folder, 12_000)).size     # 8 sqrt(n) steps
    assert (more.lr, more.muon, more.rely < 1000) == (0.02, 5, True)
    init = lambda *more: [*map(vars(prepare("--init", str(folder), *more).size).get, names)]
    monkeypatch.setattr(Pretrained, "to", lambda model, device: model)
    for gpu, *wanted in (                       # 0, 0: no base steps, no wean
        (1, [600, 128, 0.005, 0, 2, 5, 40, 0.5, 0.9, 0, 0], [600, 64, 0.02, 0, 4, 5, 40, 0.3, 0.9]),
        (0, [170, 64, 0.008, 5, 2, 2, 10, .7, .95, 0, 0], [270, 16, 0.02, 3, 5, 3, 40, 0.3, 0.9])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
        assert [init(), init("--data", "stories", "--set", "stories=2000")[:-2]] == wanted
    assert init("--set", "layer=3")[3:5] == [4, 3]       # the blocks that make flags learn


def test_a_base_of_ours_is_the_same_by_this_path(tmp_path):
    torch.manual_seed(0)
    run = F.prepare(F.parser().parse_args(
        ["--size", "tiny", "--out", str(tmp_path), "--set", "stories=4000"]))
    export.to_gpt2(run.base, run.tok.end).save_pretrained(tmp_path / "gpt2")
    export.to_fast(run.tok.merges).save_pretrained(tmp_path / "gpt2")
    base, tok = load_pretrained(tmp_path / "gpt2", 128)
    idx = torch.randint(500, (2, 20))
    for one, other in zip(F.streams(run.base, idx), F.streams(base, idx)):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(run.base(idx), base(idx), atol=1e-4)
    assert base.generate(PROMPTS, 9, temperature=0) == run.base.generate(PROMPTS, 9, temperature=0)
    for e in run.data.test[:100]:
        assert tok.encode(e.text) == run.tok.encode(e.text)
        assert tok.decode(tok.encode(e.text)) == e.text
    assert tok.prompt("x")[0] == run.tok.end == tok.end


def test_tokenizer_files_are_read_as_transformers_reads_them(tmp_path):
    fast = tokenizer()
    fast.add_tokens(["ö"])                                  # not special: it is found inside words
    small("llama", 320).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                          "stride": 0}
    spec["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                       "pad_id": 1, "pad_type_id": 0, "pad_token": "!"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    _, tok = load_pretrained(tmp_path, 40)
    for text in ("the cat saw a dog on a fine day", "x", "<|end|> is text"):
        assert tok.decode(tok.encode(text)) == text and tok.end not in tok.encode(text)
    assert fast.convert_tokens_to_ids("ö") in tok.encode("schöne")


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "config.json").unlink(),
    lambda folder: (folder / "config.json").write_text("[]"),
    lambda folder: T.T5ForConditionalGeneration(T.T5Config(
        vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
    )).save_pretrained(folder),
    lambda folder: T.LlamaForCausalLM(T.LlamaConfig(
        **GROUPED | {"vocab_size": 60})).save_pretrained(folder),
    lambda folder: change_weights(folder, lambda w: w.popitem()),
    lambda folder: change_weights(folder, lambda w: next(iter(w.values())).fill_(float("nan"))),
])
def test_bad_folders_are_one_line(spoil, tmp_path, capsys):
    folder = tmp_path / "model"
    tokenizer().save_pretrained(folder)
    small("llama", 320).save_pretrained(folder)
    spoil(folder)
    capsys.readouterr()
    assert F.main(["--size", "tiny", "--init", str(folder), "--out", str(tmp_path / "run")]) == 2
    one_line(capsys, str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", POINTER), ("tokenizer.json", POINTER), ("config.json", POINTER),
    ("tokenizer.json", b"{broken"), ("config.json", b"{broken")])
def test_spoiled_files_are_named(name, content, tmp_path):
    tokenizer().save_pretrained(tmp_path)
    small("llama", 320).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(D.Stop, match=name):
        load_pretrained(tmp_path, 40)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_prefix_of_all_weights_is_told(prefix, tmp_path):
    """As torch.compile and DataParallel leave them."""
    tokenizer().save_pretrained(tmp_path)
    small("llama", 320).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: [w.update({prefix + key: w.pop(key)}) for key in list(w)])
    with pytest.raises(D.Stop, match=f"lack .*, but have {prefix}"):
        load_pretrained(tmp_path, 40)


def test_vocab_and_merges_are_cut_as_the_model_says(tmp_path):
    """Qwen2 has digits one by one, and no tokenizer.json is needed for it."""
    small("qwen2", 320).save_pretrained(tmp_path)
    model = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {"10": 310}))
    merges = [" ".join(pair) for pair in model["merges"]] + ["1 0"]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}))
    _, tok = load_pretrained(tmp_path, 40)
    pieces = [tok.decode([i]) for i in tok.encode("the cat of 1010")]
    assert pieces[:2] == ["the", " cat"] and pieces[-4:] == ["1", "0", "1", "0"]


def change_weights(folder, how):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    how(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
