"""What the machines leave: bytes on the cables and steps of the training over time, and the flow run's page."""

import re
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from playwright.sync_api import sync_playwright

from tests.day.chronicle import Chronicle
from tests.day.report import logged_in, to_markdown
from tests.machines.stage import Stage
from tests.machines.traffic import Traffic

_SECONDS = 4.0  # until a page of the UI has fetched what it shows
_SENT, _GOT = "#0b6e99", "#d95f02"


def write(folder: Path, tell: Chronicle, traffic: Traffic, stage: Stage, run: str) -> None:
    """story.md, traffic.png, ui.png."""
    (folder / "story.md").write_text(to_markdown(tell))
    _draw(folder / "traffic.png", tell, traffic, stage, run)
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1100})
        page.add_init_script(logged_in(stage.first.environ["PREFECT_API_AUTH_STRING"]))
        page.goto(f"{stage.url}/runs/flow-run/{run}")
        page.wait_for_timeout(1000 * _SECONDS)
        page.screenshot(path=folder / "ui.png")
        browser.close()


def _draw(path: Path, tell: Chronicle, traffic: Traffic, stage: Stage, run: str) -> None:
    begin = tell.chapters[0].begin
    machines = traffic.machines
    figure, axes = plt.subplots(
        1 + len(machines), figsize=(12, 8), sharex=True, layout="constrained", height_ratios=[2] + [1] * len(machines)
    )
    _steps(axes[0], stage, run, begin)
    for machine, below in zip(machines, axes[1:], strict=True):
        times = [(then - begin) / 60 for then, _ in traffic.rows]
        for way, color, label in ((0, _SENT, "sends"), (1, _GOT, "receives")):
            counts = [row[machine.name][way] for _, row in traffic.rows]
            below.plot(
                times[1:], np.diff(counts) / 1e6 / (60 * np.diff(times)), color=color, linewidth=1.1, label=label
            )
        below.set_ylabel(f"{machine.name}\nMB/s")
        below.set_ylim(bottom=0)
    axes[1].legend(frameon=False, ncols=2, loc="upper left", fontsize=9)
    for number, chapter in enumerate(tell.chapters):
        span = (chapter.begin - begin) / 60, (chapter.end - begin) / 60
        for part in axes:
            part.axvspan(*span, color="#eef2f5" if number % 2 else "#ffffff", zorder=0)
        axes[0].text(span[0], 1.02, f"{number + 1}", transform=axes[0].get_xaxis_transform(), fontsize=9)
    told = "   ".join(f"{number}  {chapter.title}" for number, chapter in enumerate(tell.chapters, 1))
    axes[-1].set_xlabel(f"minutes\n{told}", fontsize=9)
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _steps(axes: plt.Axes, stage: Stage, run: str, begin: float) -> None:
    """The training's steps by the flow run's log, with what it says of workers."""
    points = []
    for line in stage.logs(run):
        then = (datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp() - begin) / 60
        if found := re.match(r"step (\d+) of", line["message"]):
            points.append((then, int(found[1])))
        elif found := re.match(r"(\d+ workers: .*|going on from .* with 1 workers)", line["message"]):
            axes.axvline(then, color="#57606a", linewidth=0.8, linestyle=":")
            axes.text(
                then,
                0.9 - 0.09 * (len(axes.lines) % 3),
                f" {found[1]}",
                transform=axes.get_xaxis_transform(),
                fontsize=8,
            )
    axes.plot(*zip(*points, strict=True), "o-", markersize=2.5, color="#1a7f37", linewidth=1.2)
    axes.set_ylabel("step of training")
    axes.set_ylim(bottom=0)
