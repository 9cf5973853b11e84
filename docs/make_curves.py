"""Makes docs/images/curves-*.png of five small runs on a CPU, three of which go wrong: python docs/make_curves.py FOLDER

They take some five minutes on two cores; a run that is in FOLDER already is drawn as it is. Needs matplotlib.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
# The quick start's model once it can write, and what is done with it from there.
BEGIN = ["objective.rpo_alpha=10.0", "train.max_steps=100", "train.eval_every=100"]
BARE = ["objective.rpo_alpha=null", "train.max_steps=100"]
RUNS = {
    "held": ["objective.rpo_alpha=1.0", "train.max_steps=100", "train.learning_rate=3e-4"],
    "displaced": [*BARE, "train.learning_rate=3e-4"],
    "collapsed": [*BARE, "train.learning_rate=5e-3", "objective.beta=0.01"],
    "over-optimised": [*BARE, "train.max_steps=200", "train.learning_rate=1e-3", "train.lr_scheduler_type=constant",
                       "data.train.max_samples=128", "train.num_train_epochs=100"],
}  # fmt: skip
COLOURS = {"held": "#0072b2", "displaced": "#d55e00", "collapsed": "#b2558f", "over-optimised": "#007d5a"}


def train(folder: Path, name: str, *settings: str) -> Path:
    run = folder / name
    if not (run / "final").is_dir():
        words = ["launch/configs/quickstart.yaml", f"output_dir={run}", "checkpoint.save_every=null", "log.every=2"]
        keyed = {word.split("=")[0]: word for word in [*words, *settings]}  # the last word on a key
        subprocess.run([sys.executable, "-m", "dspref", "train", *keyed.values()], cwd=DOCS.parent, check=True)
    return run


def curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: dict[str, Path], name: str, panels: list[tuple[str, list[tuple[str, str, str]]]]) -> None:
    """`panels`: title, and (run, key, dash) of each curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(panels), 3.0), layout="constrained")
    for number, (title, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for run, key, dash in curves:
            steps, values = curve(runs[run], key)
            label = f"{run}, held out" if key.startswith("eval_") else run
            label = f"{label}, {key.split('/')[-1]}" if "chosen" in key or "rejected" in key else label
            axes.plot(steps, values, dash, color=COLOURS[run], label=label, linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.savefig(DOCS / "images" / f"curves-{name}.png", dpi=90)


def main(folder: Path) -> None:
    start = train(folder, "start", *BEGIN) / "final"
    own = [f"model.name_or_path={start}", f"model.tokenizer_name_or_path={start}", "model.init=pretrained"]
    runs = {name: train(folder, name, *own, "train.eval_every=10", *settings) for name, settings in RUNS.items()}
    draw(runs, "displacement", [
        ("reward margin", [(run, "rewards/margins", "-") for run in ("held", "displaced")]),
        ("log-probability of answers", [(run, f"logps/{side}", dash) for run in ("held", "displaced")
                                        for side, dash in (("chosen", "-"), ("rejected", ":"))]),
    ])  # fmt: skip
    draw(runs, "collapse", [
        ("accuracy", [(run, "eval_rewards/accuracies", "-") for run in ("held", "collapsed")]),
        ("log-probability of chosen answers", [(run, "logps/chosen", "-") for run in ("held", "collapsed")]),
        ("entropy, nats", [(run, "entropy", "-") for run in ("held", "collapsed")]),
    ])  # fmt: skip
    draw(runs, "over-optimisation", [
        ("loss", [("over-optimised", "loss", "-"), ("over-optimised", "eval_loss", "--")]),
        ("accuracy", [("over-optimised", "rewards/accuracies", "-"), ("over-optimised", "eval_rewards/accuracies", "--")]),
    ])  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
