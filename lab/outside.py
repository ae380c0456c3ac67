"""Outside the concepts, does the flags model still write as its base does? LM loss on other text.

    python -m lab.outside wordnet --init MODEL      # first the run itself, unless it is finished
"""
import data as D
import flags as F
from lab import tools


def job(run, args):
    other = [e for e in D.load(args.other, max(16, run.flags.count), run.seed).test
             if len(run.tok.prompt(e.prompt)) <= run.size.context][:12 * run.size.prompts]
    rows = D.encode(other, run.tok, run.data.concepts, run.size.context)
    if not rows:
        raise D.Stop(f"{args.other}: no text of it is held out; more lines")
    models, _ = F.train_all(run)
    losses = {name: F.held_out(run, model, rows)[0] for name, model in models.items()}
    print(f"LM loss on {len(rows)} texts of {args.other}, nats per token: "
          + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    tools.save(run, "outside.json", losses)
    return losses


if __name__ == "__main__":
    p = tools.parser(__doc__)
    p.add_argument("other", help="stories, wordnet or a .jsonl file: text that was not trained on")
    tools.main(p, job)
