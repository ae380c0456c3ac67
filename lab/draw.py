"""What does each flag write, and what do the flags say token by token? Two pictures.

    python -m lab.draw --size small                 # out/small/matrix.png and out/small/tokens.png
"""
import torch

import flags as F
from lab import tools


def labels(names, most=14):
    """Names that fit: shortened so that they stay apart, and in letters that a font here has."""
    from matplotlib import font_manager, ft2font
    short = [name if len(name) <= most else name[:most - 1] + "…" for name in names]
    if len(set(short)) < len(short):
        short = [f"{name[:most - 4]}… {i}" if len(name) > most else name
                 for i, name in enumerate(names)]
    letters = {ord(letter) for name in short for letter in name}
    default = font_manager.findfont(font_manager.FontProperties())
    others = {font.fname for font in font_manager.fontManager.ttflist
              if "Last Resort" not in font.name}
    for path in [default, *sorted(others)]:
        if letters <= ft2font.FT2Font(path).get_charmap().keys():
            return short, font_manager.FontProperties(fname=path, size=9)
    print("no font here has the letters of all concepts: pictures number them")
    return [f"flag {i}" for i in range(len(names))], font_manager.FontProperties(size=9)


def matrix(run, model):
    """Shares (K, K): of the concept words in texts with flag i set, those of concept j."""
    prompts, values, _ = run.asked["neutral"]
    counts = torch.zeros(len(run.data.concepts), len(run.data.concepts))
    for flag, text in zip(values.argmax(1).tolist(), run.judge(F.ask(run, model, "neutral")[0])):
        for concept in text:
            counts[flag, concept] += 1
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def own_flags_of(run, model, prompt, text):
    """The model's own flags (T, K) at each token of a prompt and a text, and these tokens."""
    prompt, text = run.tok.prompt(prompt), run.tok.encode(" " + text)
    ids = (prompt + text)[:run.size.context]
    x = F.streams(model, torch.tensor([ids], device=run.device))[run.flags.layer - 1]
    own = x[0, :, run.flags.slice].cpu() / run.flags.height
    return own[1:], [run.tok.decode([i]) for i in ids[1:]], len(prompt) - 1     # without the first


def job(run, args):
    from matplotlib.figure import Figure
    models, _ = F.train_all(run)
    model = models["flags"]
    names, font = labels(run.data.concepts)
    plain = dict(fontproperties=font, parse_math=False)         # a $ is a $

    fig = Figure((6.5, 5.5), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(matrix(run, model).numpy(), vmin=0, vmax=1, cmap="Blues")
    ax.set(xlabel="concept of the words that are written", ylabel="flag that is set",
           title="one flag, neutral prompt")
    ax.set_xticks(range(len(names)), names, rotation=90, **plain)
    ax.set_yticks(range(len(names)), names, **plain)
    fig.colorbar(image, label="share of concept words")
    fig.savefig(run.out / "matrix.png", dpi=120)

    kinds = [("intact", "a prompt that tells one concept"), ("suppress", "one that tells two"),
             ("neutral", "one that tells none")]
    kinds = [(run.asked[kind][0][0], title) for kind, title in kinds if run.asked[kind][0]]
    fig = Figure((9, 4 * len(kinds)), layout="constrained")
    for ax, (prompt, title) in zip(fig.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds):
        text = F.continue_texts(run, model, [prompt])[0]    # the model's own, with its flags free
        own, tokens, begin = own_flags_of(run, model, prompt, text)
        own, tokens = own[:32], tokens[:32]
        ax.imshow(own.T.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        ax.axvline(begin - 0.5, color="C3", lw=1.5)         # the text's first token is right of it
        ax.set_title(f"{title}; right of the red line the model writes", fontsize=11)
        ax.set_xticks(range(len(tokens)), tokens, rotation=90, **plain)
        ax.set_yticks(range(len(names)), names, **plain)
    fig.savefig(run.out / "tokens.png", dpi=100)
    print(f"Wrote {run.out / 'matrix.png'}, {run.out / 'tokens.png'}")
    return {}


if __name__ == "__main__":
    tools.main(tools.parser(__doc__), job)
