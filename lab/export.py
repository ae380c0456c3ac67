"""Is the path of real checkpoints the same? A base of ours as a GPT-2 folder, for --init.

    python -m lab.export exported --size small
    python flags.py --size small --init exported --set layer=2 top=0 batch=64 produce=50 \\
        rely=600 lr=0.01 embedding_lr=0.03 decay=0.3 weight=24 no_prompt=0.15 prompts=256 \\
        track=48 muon=5
"""
from pathlib import Path

import torch

import data as D
import flags as F
from data import Stop
from lab import tools


def to_gpt2(model, end):
    """A GPT of ours as GPT2LMHeadModel: the same weights, and zeros where GPT-2 has biases."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, activation_function="relu2", bos_token_id=end, eos_token_id=end))
    names = {"wte": "transformer.wte", "wpe": "transformer.wpe", "norm": "transformer.ln_f",
             "norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj",
             "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                p.zero_()
        for name, p in model.named_parameters():
            name = name.removesuffix(".weight")
            if name.startswith("blocks."):
                _, layer, name = name.split(".", 2)
                part = theirs.get_submodule(f"transformer.h.{layer}.{names[name]}")
                p = p.T if p.dim() == 2 else p          # its matrices are (in, out), ours (out, in)
            else:
                part = theirs.get_submodule(names[name])
            part.weight.copy_(p)
    return theirs


def to_fast(merges):
    """A tokenizer of train_bpe's as transformers'. It writes bytes as GPT-2's printable letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [letters[byte] for byte in range(256)]
    for one, other in merges:
        tokens.append(tokens[one] + tokens[other])
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                [(tokens[one], tokens[other]) for one, other in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(D.PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=D.END, bos_token=D.END)


def job(run, args):
    try:
        import transformers     # noqa: F401
    except ImportError:
        raise Stop("this needs the library transformers: pip install transformers") from None
    if args.init:
        raise Stop("this exports a model of ours: without --init")
    if args.seeds > 1 or Path(args.folder).is_file():
        raise Stop(f"{args.folder} is to be a folder for one model: without --seeds")
    F.train(run, "base", run.base, run.size.base)
    to_gpt2(run.base, run.tok.end).save_pretrained(args.folder)
    to_fast(run.tok.merges).save_pretrained(args.folder)
    print(f"Wrote {args.folder}")
    return {}


if __name__ == "__main__":
    p = tools.parser(__doc__)
    p.add_argument("folder")
    tools.main(p, job)
