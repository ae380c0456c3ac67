"""Which concepts work? Three rates of flags.py, for each flag by itself.

    python -m lab.concepts --data my.jsonl      # first the run itself, unless it is finished
"""
import numpy as np

import flags as F
from lab import tools

ASKED = ("supplied", "conflict", "neutral")


def job(run, args):
    models, _ = F.train_all(run)
    table = {name: {"examples": sum(row.label[i] > 0 for row in run.train), "judge": None}
             for i, name in enumerate(run.data.concepts)}
    held = run.data.test[:12 * run.size.prompts]
    found = run.judge([e.text for e in held])
    for i, name in enumerate(run.data.concepts):
        table[name]["judge"] = F.stat(
            i in concepts for e, concepts in zip(held, found) if name in e.concepts)
    for key in ASKED:
        values, score = run.asked[key][1:]          # each row of values has one flag
        texts, _ = F.ask(run, models["flags"], key)
        hits = [score(concepts, i) for i, concepts in enumerate(run.judge(texts))]
        for i, name in enumerate(run.data.concepts):
            table[name][key] = F.stat(hit for hit, row in zip(hits, values) if row[i] == 1)
    for name, row in sorted(table.items(), key=lambda item: -item[1]["examples"]):
        print(f"  {name:20s}{row['examples']:7d} examples" + "".join(
            f"  {key} {row[key]['mean']:.2f} of {row[key]['n']}"
            for key in ("judge", *ASKED) if row[key]))
    both = [row for row in table.values() if all(row[key] for key in ASKED)]
    even = {key: float(np.mean([row[key]["mean"] for row in both])) for key in ASKED if both}
    print("mean of the concepts: " + ", ".join(f"{key} {x:.3f}" for key, x in even.items()))
    tools.save(run, "concepts.json", table | {"mean of the concepts": even})
    return {"mean of the concepts": even}


if __name__ == "__main__":
    tools.main(tools.parser(__doc__), job)
