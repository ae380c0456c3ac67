"""How much do the figures of `python flags.py` differ from seed to seed?

    python -m lab.seeds --size small --seeds 3      # mean and range over three seeds
"""
from lab import tools


def job(run, args):
    results = tools.main_results(run)
    loss = results["loss"]
    loss["flags - control"] = loss["flags"] - loss["control"]
    return {key: results[key] for key in ("seconds", "loss", "read", "steer", "reliance", "judge")}


if __name__ == "__main__":
    tools.main(tools.parser(__doc__), job)
