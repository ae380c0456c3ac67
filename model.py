"""A plain GPT: token ids in, logits out. It knows nothing of flags.

`GPT` is written from scratch, as GPT-2 is (Radford et al. 2019). `Pretrained` gives any decoder of
the library transformers the same face. Both have one opening for whatever is done to activations,
the argument `edit`: a function edit(layer, x, pos) -> x, which `forward` calls on the residual
stream after each block. It lasts for one call: there is nothing to remove afterwards.

B sequences, T positions (S: those in a cache, too), C channels, H heads, D = C / H, V tokens.
"""
import contextlib
import functools
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from data import Stop, Tokenizer

torch.backends.cuda.enable_cudnn_sdp(False)     # gave NaN as a gradient: pytorch issue 196678


@dataclass
class Config:
    vocab_size: int = 1024
    context: int = 128      # the most positions that a sequence may have
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128


# ---------------------------------------------------------------------------- the blocks

def attend(q, k, v, bias):
    """Attention of queries q (B, H, T, D) over keys and values k, v (B, H, S, D).

    bias (B or 1, 1, T, S) is 0 or, where a query must not look, -inf.
    The backward pass of torch's fused kernel is slow on a CPU at short T: there, two matmuls."""
    if q.is_cuda or q.size(-2) > 256:
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)             # (B, H, T, S)
    return (scores + bias).softmax(-1).to(v.dtype) @ v                  # (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=False)

    def forward(self, x, bias, cache):
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3 * self.n_head, -1)             # (B, T, 3 H, D)
        q, k, v = heads.transpose(1, 2).chunk(3, dim=1)                 # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                                   # each (B, H, S, D)
        y = attend(q, k, v, bias)                                       # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))             # (B, T, C)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu().square())            # ReLU squared: So et al. 2021


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.n_embd, bias=False), Attention(c)
        self.norm2, self.mlp = nn.LayerNorm(c.n_embd, bias=False), MLP(c)

    def forward(self, x, bias, cache):
        x = x + self.attn(self.norm1(x), bias, cache)
        return x + self.mlp(self.norm2(x))


class Cache:
    """Keys and values of all layers, so that each new token costs one position.

    Rows are padded on the left: all end at the same slot, and row b begins at slot pad[b]."""
    def __init__(self, n_layer, size, pad):
        self.n_layer, self.size, self.pad = n_layer, size, pad      # pad (B, 1)
        self.kv, self.layer, self.length = [None] * n_layer, 0, 0

    def append(self, k, v):
        """Store k and v (B, H, T, D) of the next layer; return all so far, each (B, H, S, D).

        The layers come in turn. The buffers have k's dtype and room for `size` positions; `length`
        grows by T after the last layer."""
        i, n, (B, H, T, D) = self.layer, self.length, k.shape
        if self.kv[i] is None:
            self.kv[i] = k.new_empty(B, H, self.size, D), v.new_empty(B, H, self.size, D)
        keys, values = self.kv[i]
        keys[:, :, n:n + T] = k
        values[:, :, n:n + T] = v
        self.layer = (i + 1) % self.n_layer
        if self.layer == 0:
            self.length += T
        return keys[:, :, :n + T], values[:, :, :n + T]


def positions(T, context, cache, device):
    """Absolute positions (B or 1, T) of the next T tokens, and the bias (see `attend`)."""
    past = cache.length if cache else 0
    pad = cache.pad if cache else torch.zeros(1, 1, dtype=torch.int64, device=device)
    slot = torch.arange(past, past + T, device=device)                      # (T,)
    keys = torch.arange(past + T, device=device)                            # (S,)
    pos = (slot - pad).clamp(0, context - 1)    # outside is padding, or what `generate` cuts off
    future = keys > slot[:, None]                                           # (T, S)
    padding = (keys < pad)[:, None] & (slot >= pad)[..., None]              # (B or 1, T, S)
    hidden = (future | padding)[:, None]    # a padding query sees itself: softmax needs something
    return pos, torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)


# ---------------------------------------------------------------------------- writing

LAST = slice(None), -1      # at each row's last position


class LanguageModel(nn.Module):
    """What GPT and Pretrained share. They differ in forward(idx, edit, cache, at), new_cache(size,
    pad), and in what their `wte`, `blocks` and `config` are."""

    @torch.inference_mode()     # as no_grad, but faster
    def generate(self, prompts, n, edit=None, temperature=0.8, generator=None, stop=-1,
                 counted=iter):
        """Continue each prompt (a list of token ids; lengths may differ) by up to n tokens.

        Returns lists of new ids; a row ends before its first `stop` token (-1: none), or where the
        context ends. Temperature 0: the likeliest token. counted(steps) may show progress. `edit`
        sees a row's own positions. Raises Stop."""
        device, context = self.wte.weight.device, self.config.context
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        if min(lengths) == 0 or longest > context:
            raise Stop(f"a prompt takes 1 to {context} tokens, not {min(lengths)} to {longest}")
        room = [context - length + 1 for length in lengths]     # each row's own: what a longer
        n = min(n, max(room))                                   # row writes beyond it is cut
        pad = torch.tensor([[longest - length] for length in lengths], device=device)   # (B, 1)
        idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        cache, new = self.new_cache(longest + n, pad), []
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for _ in counted(range(n)):
            logits = self(idx, edit, cache, at=LAST)                            # (B, V)
            idx = sample(logits.float(), temperature, generator)                # (B, 1)
            new.append(idx)
            ended |= idx[:, 0] == stop
            if ended.all():
                break
        rows = [row[:most] for row, most in zip(torch.cat(new, dim=1).tolist(), room)]
        return [row[:row.index(stop)] if stop in row else row for row in rows]


def sample(logits, temperature, generator):
    """One token id a row (B, 1), drawn from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    total = (logits / temperature).softmax(-1).cumsum(-1)
    u = torch.rand(len(logits), 1, generator=generator).to(logits.device)   # one number a row
    return torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=logits.size(-1) - 1)


# ---------------------------------------------------------------------------- the GPT

class GPT(LanguageModel):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)     # tokens
        self.wpe = nn.Embedding(c.context, c.n_embd)        # positions
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd, bias=False)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for name, p in self.named_parameters():             # GPT-2's initialization
            if p.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if deep else 0.02)

    def new_cache(self, size, pad):
        return Cache(self.config.n_layer, size, pad)

    def forward(self, idx, edit=None, cache=None, at=...):     # ...: all, as in x[...]
        """Logits (B, T, V) of token ids idx (B, T); if `at` is LAST or a (B, T) mask, those alone.

        edit(layer, x, pos) -> x is called after block `layer` (1 ... n_layer) with the residual
        stream x (B, T, C) and the absolute positions pos (B, T) or (1, T). With a cache, idx
        continues the positions that the cache already holds."""
        pos, bias = positions(idx.size(1), self.config.context, cache, idx.device)
        x = self.wte(idx) + self.wpe(pos)                                       # (B, T, C)
        if torch.is_autocast_enabled(idx.device.type):      # half the memory traffic
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x, bias, cache)
            if edit is not None:
                x = edit(layer, x, pos)
        return self.head(self.norm(x)[at])


# ---------------------------------------------------------------------------- real checkpoints

class Pretrained(LanguageModel):
    """Any decoder of the library transformers, called like a GPT."""
    def __init__(self, model, context):
        super().__init__()
        self.model, c = model.eval(), model.config.get_text_config()    # eval: without dropout
        limits = [getattr(c, f"{of}max_position_embeddings", None) for of in ("", "original_")]
        self.config = Config(self.wte.num_embeddings, min(filter(None, [context, *limits])),
                             c.num_hidden_layers, c.num_attention_heads, c.hidden_size)
        parameters = inspect.signature(model.forward).parameters
        self.past = "cache" if "cache" in parameters else "past_key_values"     # a cache's name

    @property
    def wte(self):
        return self.model.get_input_embeddings()

    @property
    def blocks(self):
        return next(part for part in self.model.get_decoder().modules()
                    if isinstance(part, nn.ModuleList) and len(part) == self.config.n_layer)

    def new_cache(self, size, pad):
        from transformers import DynamicCache
        cache = DynamicCache(config=self.model.config)
        cache.pad = pad
        return cache

    def forward(self, idx, edit=None, cache=None, at=...):
        """As GPT.forward. Hooks hang on the blocks for this one call."""
        pos, more = torch.arange(idx.size(1), device=idx.device)[None], {}      # (1, T)
        if cache is not None:       # rows are padded on the left, see Cache
            past = cache.get_seq_length()
            keys = torch.arange(past + idx.size(1), device=idx.device)
            more = {self.past: cache, "attention_mask": (keys >= cache.pad).long()}     # (B, S)
            pos = pos + past - cache.pad                                        # (B, T)
        pos = pos.clamp(0, self.config.context - 1)

        def after(layer, block, args, out):     # some blocks return x, some a tuple
            x = edit(layer, out if torch.is_tensor(out) else out[0], pos)
            return x if torch.is_tensor(out) else (x, *out[1:])

        with contextlib.ExitStack() as hooks:
            for layer, block in enumerate(self.blocks if edit else [], start=1):
                hooks.enter_context(block.register_forward_hook(functools.partial(after, layer)))
            head = self.model.get_output_embeddings()
            hooks.enter_context(head.register_forward_pre_hook(lambda head, args: args[0][at]))
            return self.model(idx, position_ids=pos, use_cache=cache is not None, **more).logits


def load_pretrained(path, context):
    """A Pretrained, in float32, of at most `context` positions, and its Tokenizer. Raises Stop."""
    path, more = Path(path), {"local_files_only": True, "trust_remote_code": False}
    path.stat()     # a FileNotFoundError says which
    if path.suffix == ".gguf":
        path, more["gguf_file"] = path.parent, path.name
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **more)
        model.hf_quantizer = None       # else what came from a .gguf file can't be saved
        lost = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind]]
        if lost or not all(p.isfinite().all() for p in model.parameters()):
            odd = "".join(f", but have {key}" for key in sorted(info["unexpected_keys"])[:1])
            raise ValueError(f"its weights lack {', '.join(lost[:3]) or 'finite numbers'}{odd}")
        model, tok = Pretrained(model, context), AutoTokenizer.from_pretrained(path, **more)
        if tok.eos_token_id is None or len(tok) > model.config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tok)} tokens, the model "
                             f"{model.config.vocab_size}; its eos_token is {tok.eos_token}")
        check(model)
    except ImportError as error:
        raise Stop(f"--init needs other packages: pip install transformers, and for a .gguf file "
                   f"gguf accelerate ({' '.join(str(error).split())})") from None
    except Exception as error:      # whatever a broken folder or a strange model raises
        line = str(error).strip().split("\n")[0]
        name, broken = more.get("gguf_file", ""), getattr(error, "doc", "?").encode()
        for file in filter(Path.is_file, path.glob(name or "*.*")):     # the library names none
            if file.open("rb").read(23) == b"version https://git-lfs":
                line = f"{file.name} is a git-lfs pointer: `git lfs pull` fetches the file"
            elif file.suffix == ".json" and file.read_bytes() == broken:
                line = f"{file.name} is no JSON: {line}"
        raise Stop(f"{path / name} can't be used: {line} ({type(error).__name__})") from None
    plain = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
    spaced = tok.tokenize("a", **plain)[0].startswith("\u2581")     # puts a space before every text
    encode = lambda text: tok(text.removeprefix(" ") if spaced else text, **plain).input_ids
    decode = functools.partial(tok.decode, clean_up_tokenization_spaces=False)
    begin, end = (tok("").input_ids or [tok.eos_token_id])[0], tok.eos_token_id
    return model, Tokenizer(encode, decode, begin, end, len(tok), None, tok.save_pretrained)


def check(model):
    """Padded and with an edit it must write what it writes without. ValueError if not."""
    prompts, c, seen = [[1, 2, 3], [4]], model.config, []
    spy = lambda layer, x, pos: seen.append((layer, x.size(-1))) or x
    wanted = [model.generate([prompt], 3, temperature=0)[0] for prompt in prompts]
    if (model.generate(prompts, 3, spy, temperature=0) != wanted
            or seen != [(layer, c.n_embd) for layer in range(1, c.n_layer + 1)] * 3):
        raise ValueError("this kind of model can't be steered here")


# ---------------------------------------------------------------------------- training states

def fast_bfloat16(device):
    """Whether this device has instructions for it. A CPU without is 10 times faster in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":     # older ones emulate it
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Muon(torch.optim.Muon):
    """Torch's, which casts to bfloat16 inside; where that is slow, the cast gives float32."""
    def step(self, closure=None):
        fast = fast_bfloat16(self.param_groups[0]["params"][0].device)
        how = torch.Tensor.bfloat16 if fast else torch.Tensor.float
        with mock.patch("torch.Tensor.bfloat16", how):
            return super().step(closure)


def optimizers(model, lr, embedding_lr, decay, ns_steps=5):
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for embeddings and norms.

    On the stories Muon needs less than half of AdamW's steps. New embeddings want a higher rate."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad]
    rest = [p for p in model.parameters() if p.requires_grad and p not in set(matrices)]
    opts = [Muon(matrices, lr, decay, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")]
    if rest:        # some models train none
        opts.append(torch.optim.AdamW(rest, embedding_lr, (0.9, 0.95), weight_decay=0, fused=True))
    return opts
