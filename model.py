"""A plain GPT: token ids in, logits out. It knows nothing of flags.

One readable block covers two families, so that the class which trains from scratch in minutes also
runs real checkpoints: GPT-2 (LayerNorm, learned positions, GELU; Radford et al. 2019) and Llama
(RMSNorm, rotary positions, SwiGLU, grouped-query attention; Touvron et al. 2023), which Phi-3,
Phi-4-mini, Qwen2 and SmolLM2 follow. What their checkpoints call things stands at the end.

The one opening for everything that is done to activations is the argument `edit`: a function
edit(layer, x, pos) -> x that `forward` calls on the residual stream after each block. It is an
argument and not a hook, so there is no global state and nothing to remove afterwards.

Shapes: B sequences, T positions, C channels (the residual width), H heads, D = C / H, V tokens.
"""
import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    vocab_size: int = 1024
    context: int = 128              # the most positions that a sequence may have
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_kv_head: int | None = None    # fewer than n_head: grouped-query attention
    head_dim: int | None = None     # n_embd / n_head unless a checkpoint says otherwise
    n_hidden: int | None = None     # width of the MLP, 4 * n_embd
    mlp: str = "relu2"              # "relu2" (So et al. 2021), "gelu" (GPT-2's tanh form), "swiglu"
    norm: str = "layer"             # "layer" or "rms"
    norm_eps: float = 1e-5
    bias: bool = False              # biases in the MLP and LayerNorm
    qkv_bias: bool = False
    out_bias: bool | None = None    # bias of the attention's output; as `bias` unless said
    rope: dict | None = None        # None: learned positions; else see `rotary`
    tied: bool = True               # the head is the token embedding
    source: dict | None = field(default=None, repr=False)   # the checkpoint's config.json, if any

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        self.out_bias = self.bias if self.out_bias is None else self.out_bias


# At each call nn.Module looks for hooks, and at each use for its parameters: a sixth of a written token.
# Nobody hangs hooks on these, and their parameters are what torch's functions call weight and bias.
class Linear(nn.Linear):
    def __call__(self, x):
        return F.linear(x, **self._parameters)


class Embedding(nn.Embedding):
    def __call__(self, idx):
        return F.embedding(idx, **self._parameters)


class LayerNorm(nn.LayerNorm):
    def __call__(self, x):
        return F.layer_norm(x, self.normalized_shape, eps=self.eps, **self._parameters)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):       # torch wants one dtype here, and autocast does not see to that
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
    __call__ = forward


def make_norm(c):
    if c.norm == "rms":
        return RMSNorm(c.n_embd, eps=c.norm_eps)
    return LayerNorm(c.n_embd, eps=c.norm_eps, bias=c.bias)


def attend(q, k, v, bias):
    """Attention of q (B, H, T, D) over k, v (B, H, S, D).

    bias (T, S) or (B, 1, T, S) is 0 or, where a query must not look, -inf; None: it may anywhere.
    Torch's fused kernel is fastest, but on a CPU its backward is slow at short lengths: there two
    matmuls with a float32 softmax between them train faster.
    """
    if bias is None or q.is_cuda or q.size(-2) > 256:
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)             # (B, H, T, S)
    return (scores + bias).softmax(-1).to(v.dtype) @ v                  # (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.sizes = [c.n_head, c.n_kv_head, c.n_kv_head]
        self.head_dim = c.head_dim
        self.qkv = Linear(c.n_embd, sum(self.sizes) * c.head_dim, bias=c.qkv_bias)
        self.out = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)

    def forward(self, x, bias, angles, cache):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)     # (B, H + 2 Hkv, T, D)
        q, k, v = qkv.split(self.sizes, dim=1)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.append(k, v)                                       # (B, Hkv, S, D)
        if k.size(1) < q.size(1):
            k, v = (a.repeat_interleave(q.size(1) // a.size(1), dim=1) for a in (k, v))
        y = attend(q, k, v, bias)                                           # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))                # (B, T, C)
    __call__ = forward


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.kind = c.mlp
        self.up = Linear(c.n_embd, c.n_hidden * (2 if c.mlp == "swiglu" else 1), bias=c.bias)
        self.down = Linear(c.n_hidden, c.n_embd, bias=c.bias)

    def forward(self, x):
        h = self.up(x)                                                      # (B, T, n_hidden)
        if self.kind == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = h.relu().square() if self.kind == "relu2" else F.gelu(h, approximate="tanh")
        return self.down(h)
    __call__ = forward


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = make_norm(c), Attention(c)
        self.norm2, self.mlp = make_norm(c), MLP(c)

    def forward(self, x, bias, angles=None, cache=None):
        x = x + self.attn(self.norm1(x), bias, angles, cache)
        return x + self.mlp(self.norm2(x))


def rotary(c, pos, length):
    """cos and sin, each (B or 1, 1, T, R), of the rotary angles at positions pos (B or 1, T).

    c.rope["theta"] is the base of the wavelengths (Su et al. 2021). Two ways to stretch a context
    from c.rope["original"] positions to more are told by c.rope["type"]:
    "llama3" (Llama 3.1, Meta 2024): waves that turn fewer than "low" times in the original context
    become "factor" times longer, those that turn more than "high" times stay, in between linearly.
    "longrope" (Ding et al. 2024): each wave has a stretch of its own, "short" while the sequence's
    `length` is within "switch", "long" beyond; cos and sin are multiplied by "attention".
    """
    r = c.rope
    R = r.get("dim", c.head_dim)        # the first R of a head's channels turn, the rest stay
    stretch, scale = 1.0, 1.0
    if r.get("type") == "longrope":
        stretch = torch.tensor(r["long" if length > r["switch"] else "short"], device=pos.device)
        scale = r["attention"]
    inv = 1 / (stretch * r["theta"] ** (torch.arange(0, R, 2, device=pos.device) / R))  # (R / 2,)
    if r.get("type") == "llama3":
        turns = r["original"] * inv / (2 * math.pi)
        keep = ((turns - r["low"]) / (r["high"] - r["low"])).clamp(0, 1)
        inv = inv * (keep + (1 - keep) / r["factor"])
    angle = pos[:, None, :, None] * torch.cat([inv, inv])
    return angle.cos() * scale, angle.sin() * scale         # float32: bfloat16 cannot count to 1000


def rotate(x, cos, sin):
    """Turn x (B, H, T, D): channel i is paired with i + R/2, as Llama's checkpoints do."""
    x, rest = x.tensor_split([cos.size(-1)], dim=-1)
    a, b = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


class Cache:
    """Keys and values of all layers, so that each new token costs one position.

    Rows are padded on the left: all end at the same slot, and row b begins at slot pad[b].
    """
    def __init__(self, n_layer, size, pad):
        self.n_layer, self.size, self.pad = n_layer, size, pad[:, None]     # pad (B, 1)
        self.kv, self.layer, self.length = [None] * n_layer, 0, 0
        self.before = torch.arange(size, device=pad.device) < self.pad      # (B, size): the padding
        self.ragged = bool(pad.any())

    def append(self, k, v):
        """Store k and v (B, Hkv, T, D) of the next layer; return all so far, each (B, Hkv, S, D)."""
        i, n, (B, H, T, D) = self.layer, self.length, k.shape
        if self.kv[i] is None:
            self.kv[i] = k.new_empty(B, H, self.size, D), v.new_empty(B, H, self.size, D)
        keys, values = self.kv[i]
        keys.narrow(2, n, T).copy_(k)
        values.narrow(2, n, T).copy_(v)
        self.layer = (i + 1) % self.n_layer
        if self.layer == 0:
            self.length += T
        return keys.narrow(2, 0, n + T), values.narrow(2, 0, n + T)


def positions(T, context, cache, device):
    """Absolute positions (B or 1, T) of the next T tokens, and the bias of their attention."""
    past = cache.length if cache else 0
    slot = torch.arange(past, past + T, device=device)                      # (T,)
    if T == 1 and cache and not cache.ragged:
        return slot[None], None
    pos = slot - cache.pad if cache else slot[None]                         # (B or 1, T)
    pos = pos.clamp(0, context - 1)             # outside is padding, or what `generate` cuts off
    hidden = torch.arange(past + T, device=device) > slot[:, None]          # (T, S): the future
    if cache:   # a padding query sees itself, lest its softmax have nothing to sum over
        before = cache.before[:, None, :past + T] & (slot[:, None] >= cache.pad[:, None])
        hidden = (hidden | before)[:, None]                                 # (B, 1, T, S)
    return pos, torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.checkpoint = False     # True: keep one activation a layer in training, redo the rest
        self.wte = Embedding(c.vocab_size, c.n_embd)
        if c.rope is None:
            self.wpe = Embedding(c.context, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = make_norm(c)
        self.head = Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.wte.weight
        for name, p in self.named_parameters():     # GPT-2's initialization
            if p.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def stream(self, idx, edit=None, cache=None):
        """The final residual stream (B, T, C), normed, of token ids idx (B, T)."""
        past = cache.length if cache else 0
        pos, bias = positions(idx.size(1), self.config.context, cache, idx.device)
        angles = rotary(self.config, pos, past + idx.size(1)) if self.config.rope else None
        x = self.wte(idx)                                                       # (B, T, C)
        if angles is None:
            x = x + self.wpe(pos)
        if torch.is_autocast_enabled(idx.device.type):      # half the memory traffic
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        for layer, block in enumerate(self.blocks, start=1):
            if self.checkpoint and self.training and cache is None:
                x = checkpoint(block, x, bias, angles, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, bias, angles, cache)
            if edit is not None:
                x = edit(layer, x, pos)
        return self.norm(x)

    def forward(self, idx, edit=None, cache=None, at=None):
        """Logits (B, T, V) of token ids idx (B, T); or (N, V), where `at` (B, T) bool is true.

        edit(layer, x, pos) -> x is called after block `layer` (1 ... n_layer) with the residual
        stream x (B, T, C) and the absolute positions pos (B, T) or (1, T). With a Cache, idx
        continues the positions that the cache already holds.
        """
        x = self.stream(idx, edit, cache)
        return self.head(x if at is None else x[at])

    @torch.inference_mode()
    def generate(self, prompts, n, edit=None, temperature=0.8, top_k=None, generator=None,
                 stop=None):
        """Continue each prompt (a list of token ids; lengths may differ) by up to n tokens.

        Returns a list of lists of new ids; a row ends before its first `stop` token. temperature 0
        takes the most likely token. edit sees absolute positions, which are a row's own: its first
        token is at 0 whatever the others' lengths. ValueError: a prompt that is empty or longer
        than the context.
        """
        device, longest = self.wte.weight.device, max(map(len, prompts))
        if min(map(len, prompts)) == 0 or longest > self.config.context:
            raise ValueError(f"a prompt has {longest if all(prompts) else 0} tokens; "
                             f"this model takes 1 to {self.config.context}")
        room = [self.config.context - len(p) + 1 for p in prompts]      # each row's own: what a
        n = min(n, max(room))                                           # longer one writes beyond is cut
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)
        idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        cache, first, new = Cache(self.config.n_layer, longest + n, pad), idx, []
        switch = (self.config.rope or {}).get("switch")     # LongRoPE: a length, see `rotary`
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for _ in range(n):
            if cache.length == switch:  # all keys turn otherwise from here on: read them again
                cache = Cache(self.config.n_layer, longest + n, pad)
                idx = torch.cat([first, *new], dim=1)
            x = self.stream(idx, edit, cache)[:, -1]                            # (B, C)
            idx = sample(self.head(x).float(), temperature, top_k, generator)   # (B, 1)
            new.append(idx)
            if stop is not None:
                ended |= idx[:, 0] == stop
                if ended.all():
                    break
        rows = [row[:most] for row, most in zip(torch.cat(new, dim=1).tolist(), room)]
        return [row[:row.index(stop)] if stop in row else row for row in rows]

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, folder, context=None):
        """The model in a Hugging Face folder (config.json and weights), in float32 on the CPU.

        `context` caps the number of positions. Raises FileNotFoundError for a file that is not
        there, ValueError with one line for a model that this class cannot run or weights that do
        not fit it, ImportError for a .safetensors file without the package safetensors.
        """
        c = config_of(json.loads((Path(folder) / "config.json").read_text("utf-8")), context)
        theirs, wrong = read_weights(Path(folder), c.source["model_type"]), []
        with torch.device("meta"):      # spares the random initialization
            model = cls(c)
        model.to_empty(device="cpu")
        if c.tied:
            model.head.weight = model.wte.weight
        for key, view in views(model, c.source["model_type"]):
            w = theirs.pop(key, None)
            if w is not None and context and key.endswith(".wpe.weight"):
                w = w[:c.context]
            if w is None:
                wrong.append(f"{key} is missing")
            elif w.shape != view.shape:
                wrong.append(f"{key} is {tuple(w.shape)} and should be {tuple(view.shape)}")
            else:
                view.copy_(w)
        head = theirs.pop("lm_head.weight", None)       # still here only if it is tied
        if head is not None and not wrong and not torch.equal(head.float(), model.head.weight):
            wrong.append("lm_head.weight is not the embedding that config.json ties it to")
        wrong += [f"{key} is unexpected" for key in theirs]
        if wrong:
            more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
            raise ValueError(f"the weights in {folder} do not fit: {'; '.join(wrong[:6])}{more}")
        return model

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Write config.json and model.safetensors: transformers loads them, to the same logits.

        A model that was loaded keeps its config.json. One of ours becomes a "gpt2" or, if its
        positions are rotary, a "llama"; biases that those have and it has not are zeros. Raises
        ValueError for a Config that neither can express.
        """
        save_file, folder, dtype = safetensors().save_file, Path(folder), self.wte.weight.dtype
        d = dict(self.config.source or their_config(self.config))
        d.pop("dtype", None)                            # transformers 5's word for torch_dtype
        d.pop("auto_map", None)                         # names .py files that are not written here
        d["torch_dtype"] = str(dtype).removeprefix("torch.")
        if "n_positions" in d:
            d["n_positions"] = self.config.context
        full = config_of(d, self.config.context)
        for key, value in vars(self.config).items():
            lacks_bias = key.endswith("bias") and not value
            if value != getattr(full, key) and key != "source" and not lacks_bias:
                raise ValueError(f"a folder of type {d['model_type']} cannot say {key} = {value!r}")
        theirs = {key: view.cpu().clone(memory_format=torch.contiguous_format)
                  for key, view in views(self, d["model_type"])}
        with torch.device("meta"):
            for key, view in views(GPT(full), d["model_type"]):
                theirs.setdefault(key, torch.zeros(view.shape, dtype=dtype, device="cpu"))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(d, indent=2) + "\n", "utf-8")


def sample(logits, temperature, top_k, generator):
    """One token id a row (B, 1), drawn from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    total = logits.softmax(-1).cumsum(-1)       # one random number a row: far cheaper than one a token
    u = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    return torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=logits.size(-1) - 1)


# ------------------------------------------------------------- checkpoints of the Hugging Face kind

# What our settings are called in config.json and our modules in the files of weights. Joined by +:
# ours holds their rows, one below the other.
TABLE = """
    vocab_size   vocab_size            vocab_size
    context      n_positions           max_position_embeddings
    n_layer      n_layer               num_hidden_layers
    n_head       n_head                num_attention_heads
    n_embd       n_embd                hidden_size
    n_hidden     n_inner               intermediate_size
    mlp          activation_function   hidden_act
    norm_eps     layer_norm_epsilon    rms_norm_eps
    tied         tie_word_embeddings   tie_word_embeddings
    n_kv_head    -                     num_key_value_heads
    head_dim     -                     head_dim
    qkv_bias     -                     attention_bias
    out_bias     -                     attention_bias
    bias         -                     mlp_bias

    wte          transformer.wte       model.embed_tokens
    wpe          transformer.wpe       -
    blocks       transformer.h         model.layers
    .norm1       ln_1                  input_layernorm
    .attn.qkv    attn.c_attn           self_attn.q_proj+self_attn.k_proj+self_attn.v_proj
    .attn.out    attn.c_proj           self_attn.o_proj
    .norm2       ln_2                  post_attention_layernorm
    .mlp.up      mlp.c_fc              mlp.gate_proj+mlp.up_proj
    .mlp.down    mlp.c_proj            mlp.down_proj
    norm         transformer.ln_f      model.norm
    head         lm_head               lm_head
"""
ROWS = [line.split() for line in TABLE.splitlines() if line]
GPT2, LLAMA = ({row[0]: row[i] for row in ROWS if row[i] != "-"} for i in (1, 2))
PHI3 = LLAMA | {".attn.qkv": "self_attn.qkv_proj", ".mlp.up": "mlp.gate_up_proj"}
NAMES = {"gpt2": GPT2, "llama": LLAMA, "qwen2": LLAMA, "phi3": PHI3}    # by model_type
SETTINGS = [row[0] for row in ROWS[:14]]
MLPS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu2": "relu2", "silu": "swiglu"}

# Settings that change the computation, with the one value of each that is written in this file.
ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "use_sliding_window": False, "lm_head_bias": False,
        "use_qk_norm": False, "qk_layernorm": False, "num_local_experts": None,
        "quantization_config": None}


def views(model, kind):
    """All tensors of a checkpoint: the name there, and the part of our parameter that it is.

    Loading copies into these views, saving copies out of them: one table serves both ways.
    """
    c = model.config
    for name, p in model.named_parameters():
        module, leaf = name.rsplit(".", 1)              # leaf is "weight" or "bias"
        block = re.match(r"blocks\.(\d+)", module)
        if block:
            module = module[block.end():]               # with its dot
        theirs = NAMES[kind][module].split("+")
        rows = [len(p) // len(theirs)] * len(theirs)
        if len(theirs) == 3:
            rows = [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
        for their, part in zip(theirs, p.split(rows)):
            if block:
                their = f"{NAMES[kind]['blocks']}.{block[1]}.{their}"
                if kind == "gpt2" and part.dim() == 2:
                    part = part.T                       # its matrices are (in, out), ours (out, in)
            yield f"{their}.{leaf}", part


def config_of(d, context=None):
    """Our Config for d, the contents of a config.json, with at most `context` positions."""
    kind = d.get("model_type")
    if kind not in NAMES:
        raise ValueError(f"model_type {kind!r} is not one of those known here: {', '.join(NAMES)}")
    for key, value in ONLY.items():
        if d.get(key, value) != value:
            raise ValueError(f"{key} = {d[key]!r} is not written here, only {value!r}")
    if set(d.get("layer_types") or []) - {"full_attention"}:
        raise ValueError("layer_types has other than 'full_attention', which alone is written here")
    known = {"n_inner": None, "num_key_value_heads": None, "head_dim": None, "mlp_bias": False,
             "attention_bias": False, "tie_word_embeddings": kind == "gpt2"} | d
    try:
        c = Config(**{key: known[NAMES[kind][key]] for key in SETTINGS if key in NAMES[kind]})
        if c.mlp not in MLPS or (kind == "gpt2") == (c.mlp == "silu"):
            raise ValueError(f"{NAMES[kind]['mlp']} {c.mlp!r} is not written here")
        c.mlp, c.source = MLPS[c.mlp], d
        if kind == "gpt2":
            c.bias = c.qkv_bias = c.out_bias = True
        else:
            c.norm, c.rope, c.qkv_bias = "rms", rope_of(c, d), c.qkv_bias or kind == "qwen2"
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}") from None
    c.context = min(c.context, context or c.context)
    window = d.get("sliding_window") if kind == "phi3" else None
    if window and window < c.context:
        warnings.warn(f"this model's attention reaches back {window} positions, ours to the "
                      f"start: the context is capped at {window}, where the two are the same")
        c.context = window
    return c


def rope_of(c, d):
    """Our rotary settings (see `rotary`) for a config.json."""
    # the hub's folders keep some of them outside rope_scaling; transformers 5 has rope_parameters
    r = d | (d.get("rope_scaling") or d.get("rope_parameters") or {})
    kind = r.get("rope_type", r.get("type", "default"))
    if kind not in ("default", "llama3", "longrope", "su") or "full_attention" in r:
        raise ValueError(f"rotary scaling {kind!r} is not one of default, llama3, longrope, su")
    R = int(c.head_dim * r.get("partial_rotary_factor", 1))
    rope = {"theta": r.get("rope_theta", 10000.0)} | ({"dim": R} if R < c.head_dim else {})
    if kind == "default":
        return rope
    original = d.get("original_max_position_embeddings") or r["original_max_position_embeddings"]
    if kind == "llama3":
        return rope | {"type": "llama3", "factor": r["factor"], "low": r["low_freq_factor"],
                       "high": r["high_freq_factor"], "original": original}
    if not len(r["short_factor"]) == len(r["long_factor"]) == R // 2:
        raise ValueError(f"short_factor and long_factor should have {R // 2} numbers each")
    grown = max(1, r.get("factor") or c.context / original)
    scale = r.get("attention_factor") or math.sqrt(1 + math.log(grown) / math.log(original))
    return rope | {"type": "longrope", "short": r["short_factor"], "long": r["long_factor"],
                   "switch": original, "attention": scale}


def their_config(c):
    """A config.json for a model of ours; `save_pretrained` checks that nothing is lost in it."""
    kind, architecture = ("llama", "LlamaForCausalLM") if c.rope else ("gpt2", "GPT2LMHeadModel")
    d = {NAMES[kind][key]: getattr(c, key) for key in SETTINGS if key in NAMES[kind]}
    d |= {"model_type": kind, "architectures": [architecture], "bos_token_id": None,
          "eos_token_id": None}
    if c.rope:
        return d | {"hidden_act": "silu", "rope_theta": c.rope["theta"],
                    "attention_bias": c.qkv_bias or c.out_bias}
    return d | {"activation_function": "relu2" if c.mlp == "relu2" else "gelu_new"}


def read_weights(folder, kind):
    """All tensors of the folder, by name, from one file or from those that an index lists."""
    tensors = {}
    for name in ("model.safetensors", "pytorch_model.bin"):
        files, index = [folder / name], folder / f"{name}.index.json"
        if not files[0].exists() and index.exists():
            names = json.loads(index.read_text("utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(names))]
        elif not files[0].exists():
            continue
        for file in files:
            try:        # weights_only, for a pickle can run any program
                tensors |= (torch.load(file, map_location="cpu", weights_only=True)
                            if "pytorch" in name else safetensors().load_file(file))
            except (OSError, ImportError):
                raise
            except Exception as error:      # whatever a broken file makes of its reader
                raise ValueError(f"{file} is no whole file of tensors alone and was not loaded "
                                 f"({type(error).__name__})") from None
        prefix = NAMES[kind]["wte"].split(".")[0] + "."     # some files were saved without it
        computed = r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$"      # masks and angles
        return {key if key.startswith((prefix, "lm_head.")) else prefix + key: w
                for key, w in tensors.items() if not re.search(computed, key)}
    raise FileNotFoundError(f"there is no model.safetensors or pytorch_model.bin in {folder}")


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("for .safetensors files, pip install safetensors") from None
    return safetensors.torch
