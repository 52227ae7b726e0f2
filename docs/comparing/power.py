"""Draws power.svg and prints the table of docs/statistics.md: python docs/comparing/power.py, from the repository."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vlm_local.lab import pages
from vlm_local.lab.closed_loop.until_separated import ALPHA_EACH
from vlm_local.lab.sequential import ALPHA, find_decision, simulate_power

DIFFERENCES = (0.1, 0.2, 0.3, 0.4, 0.5)
PAIRS = (25, 50, 100, 200, 400)
NUM_NULL, NUM_SHOWN = 10_000, 200


def draw_comparisons(difference: float, num: int, num_pairs: int, seed: int) -> np.ndarray:
    """Leads, float (num, num_pairs), of success rates around 50 % that are this far apart."""
    draws = np.random.default_rng(seed).random((2, num, num_pairs))
    return (draws[0] < 0.5 + difference / 2) * 1.0 - (draws[1] < 0.5 - difference / 2)


def count_decided(difference: float, num: int) -> np.ndarray:
    """Share of the comparisons that are decided after 1, 2 ... NUM_SHOWN pairs, at ALPHA."""
    decided = np.concatenate(
        [find_decision(draw_comparisons(difference, 500, NUM_SHOWN, seed)) for seed in range(num // 500)]
    )
    return np.bincount(decided, minlength=NUM_SHOWN + 1)[1:].cumsum() / num


@pages.styled
def draw_power(path: Path) -> None:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    plot = figure.subplots()
    colours = (pages.RED, pages.GREY, pages.ORANGE, pages.GREEN, pages.BLUE)
    for difference, colour in zip((0.0, *DIFFERENCES[:4]), colours, strict=True):
        shares = count_decided(difference, NUM_NULL if difference == 0 else 2000)
        label = f"{100 * difference:.0f} points apart" if difference else f"equal ({shares[-1]:.1%} at the end)"
        plot.plot(range(1, NUM_SHOWN + 1), shares, color=colour, label=label)
    plot.axhline(ALPHA, color=pages.BLACK, linewidth=0.7, linestyle="--")
    plot.set(xlim=(0, NUM_SHOWN), ylim=(0, 1), xlabel="pairs of episodes, looked at after each", ylabel="share decided")
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})


def print_table() -> None:
    print("| points apart | " + " | ".join(f"{num} pairs" for num in PAIRS) + " |")
    print("| ---: |" + " ---: |" * len(PAIRS))
    for difference in DIFFERENCES:
        cells = [simulate_power(difference, num, ALPHA_EACH) for num in PAIRS]
        print(f"| {100 * difference:.0f} | " + " | ".join(f"{share:.0%}, {mean:.0f}" for share, mean in cells) + " |")


if __name__ == "__main__":
    draw_power(Path(__file__).with_name("power.svg"))
    print_table()
