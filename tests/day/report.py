"""What the day leaves: a table of chapters, a timeline, screenshots of the Prefect UI."""

import time
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
from playwright.sync_api import sync_playwright

from tests.day.chronicle import Chronicle
from tests.day.stage import Stage

_COLORS = {
    "Promoted": "#1a7f37",
    "Refused": "#bc4c00",
    "NothingNew": "#8c959f",
    "Completed": "#0b6e99",
    "Failed": "#b3261e",
    "Crashed": "#b3261e",
}
_SECONDS = 4.0  # until a page of the UI has fetched what it shows


def write(folder: Path, part: str, tell: Chronicle, stage: Stage) -> None:
    """`<part>.md`; of the story the timeline and the screenshots, too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.md").write_text(to_markdown(tell))
    if part == "story":
        _timeline(folder / "timeline.png", tell, stage)
        _screenshots(folder, stage)
        page = stage.folder / "quarantine.html"
        if page.exists():
            (folder / page.name).write_bytes(page.read_bytes())


def to_markdown(tell: Chronicle) -> str:
    """A table of the chapters."""
    begin = tell.chapters[0].begin if tell.chapters else time.time()
    lines = ["| from | to | chapter | what was seen |", "|---:|---:|---|---|"]
    for chapter in tell.chapters:
        seen = [*chapter.seen, *(f"**WRONG**: {told}" for told in chapter.wrong)]
        told = "<br>".join(text.replace("\n", "<br>").replace("|", "\\|") for text in seen)
        lines.append(f"| {chapter.begin - begin:.0f} s | {chapter.end - begin:.0f} s | {chapter.title} | {told} |")
    return "\n".join(lines) + "\n"


def _timeline(path: Path, tell: Chronicle, stage: Stage) -> None:
    """Chapters as bands, the flow runs that the server knows of as bars."""
    begin = tell.chapters[0].begin
    runs = [run for run in stage.runs() if run["start_time"] and run["end_time"]]
    figure, axes = plt.subplots(figsize=(12, 2.6 + 0.28 * len(runs)), layout="constrained")
    for number, chapter in enumerate(tell.chapters):
        span = (chapter.begin - begin) / 60, (chapter.end - begin) / 60
        axes.axvspan(*span, color="#eef2f5" if number % 2 else "#ffffff", zorder=0)
        axes.text(span[0], -0.9, f" {number + 1}", va="center", fontsize=9, color="#5b6670")
    for row, run in enumerate(runs):
        start, end = ((_seconds(run[name]) - begin) / 60 for name in ("start_time", "end_time"))
        color = _COLORS.get(run["state_name"], "#57606a")
        axes.barh(row, max(end - start, 0.03), left=start, color=color, height=0.7, zorder=2)
        axes.text(end, row, f" {run['name']}: {run['state_name']}", va="center", fontsize=8)
    until = (tell.chapters[-1].end - begin) / 60
    axes.set(xlim=(0, 1.15 * until), ylim=(len(runs), -1.6), yticks=[], xlabel="minutes since the first chapter began")
    axes.set_title("Flow runs of the day, by chapter", loc="left", fontsize=11)
    names = [f"{number}  {chapter.title}" for number, chapter in enumerate(tell.chapters, start=1)]
    axes.text(0, -0.22, "\n".join(names), transform=axes.transAxes, va="top", fontsize=8.5, color="#5b6670")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def logged_in(login: str) -> str:
    """A script that tells the pages of Prefect's UI the login."""
    return f"localStorage.setItem('prefect-password', btoa('{login}'))"


def _screenshots(folder: Path, stage: Stage) -> None:
    runs = [run for run in stage.runs() if run["state_name"] == "Promoted"]
    pages = {"ui_runs.png": "/runs", "ui_deployments.png": "/deployments"}
    if runs:
        pages["ui_promoted.png"] = f"/runs/flow-run/{runs[0]['id']}"
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.add_init_script(logged_in(stage.environ["PREFECT_API_AUTH_STRING"]))
        for name, path in pages.items():
            page.goto(f"{stage.url}{path}")
            page.wait_for_timeout(1000 * _SECONDS)
            page.screenshot(path=folder / name)
        if runs:  # the last page is its
            page.get_by_text("Artifacts", exact=True).click()
            page.wait_for_timeout(1000 * _SECONDS)
            page.screenshot(path=folder / "ui_artifacts.png")
        browser.close()
