"""What a person sees who follows the printed link in a browser: pages of a real MLflow server, in Chromium.

`SSL_RAY_SCREENSHOTS=DIR` keeps pictures of the pages.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from recorded import constant, make_study, record
from studies import place_database

from ssl_ray.report.write import write_report
from ssl_ray.storage.files import file_digest
from ssl_ray.study.parts import folders_of
from ssl_ray.tracking.run import NetworkFile
from ssl_ray.tracking.server import serving
from ssl_ray.tracking.tracker import Tracker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium"),
]


@dataclass
class Browser:
    """Opens pages of one server, each in a browser that has never been there."""

    server: str
    tracker: Tracker
    folder: Path

    def see(self, place: str, name: str, *expected: str) -> str:
        """The page at a link, or a place behind `#`: its text, and its HTML's `src` and `href`.

        Parts of a page are loaded when they are shown: it is looked at again, for longer, until all that is expected is
        there, three times at most.
        """
        url, page = place if place.startswith("http") else f"{self.server}/#{place}", ""
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={self.folder / name}", "--window-size=1600,900"]
        for milliseconds in (10_000, 30_000, 60_000):
            patient = [*command, f"--virtual-time-budget={milliseconds}"]
            done = subprocess.run([*patient, "--dump-dom", url], check=True, capture_output=True, timeout=120)
            html = re.sub(r"<(script|style).*?</\1>", "", done.stdout.decode(), flags=re.DOTALL)
            links = " ".join(re.findall(r'(?:src|href)="([^"]{,2000})"', html))
            page = f"{' '.join(re.sub(r'<[^>]*>', ' ', html).split())} {links}".replace("&amp;", "&")
            if all(one in page for one in expected):
                break
        if shown := os.environ.get("SSL_RAY_SCREENSHOTS"):
            picture = Path(shown, f"{name}.png").absolute()
            subprocess.run([*patient, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=120)
        assert not [one for one in expected if one not in page]
        return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A study of eight trials with its report, one of which has a network, on MLflow's server."""
    folder = tmp_path_factory.mktemp("browser")
    study = make_study(folder)
    place_database(folder / "mlflow.db")
    tracker = record(study, constant(study, 0.5, 0.6), folder)
    path = folder / "model.safetensors"
    path.write_bytes(b"weights")
    (best,) = [run for run in tracker.runs(kind="trial") if run.info.run_name.startswith("12 labelled, pre")][:1]
    run = tracker.open("trial", best.data.tags["ssl_ray.key"], "", {})
    run.model(NetworkFile("n12-pretrained", str(path), file_digest(path), 200, True, 1, (2.0, 2.0, 2.0)))
    run.close()
    tracker.settle()
    write_report(study, tracker, folders_of(study).study)
    tracker.register("fake-segmenter", "Networks of the study.", best.info.run_id, "12 labelled, pretrained")
    with serving(tracker.uri, folder / "artifacts") as (server, _):
        yield Browser(server, tracker, folder)
    tracker.stop()


def test_the_printed_link_is_the_comparison_of_the_trials(browser: Browser) -> None:
    """In a browser that is new to the server: parallel coordinates over split, start and rate, to the reported Dice."""
    page = browser.see(
        browser.tracker.link(browser.server), "comparison", "The trials of fake", "Parallel Coordinates", " init "
    )
    assert "Model training" in page
    assert "Evaluation runs" not in page, "of the pages for generative AI"
    _, _, chart = page.partition("Parallel")
    assert re.search(r"\bsize\b.*\binit\b.*\blr\b.*\bdice\b", chart), "the axes in their order"
    assert "12 labelled, pretrained, lr 0.0003, run 0" in page
    assert "does pretraining help?" not in page, "the grid is no trial"


def test_the_grid_shows_the_answer(browser: Browser) -> None:
    """Its description has the verdict, the table and the figure, and links to the report."""
    (grid,) = browser.tracker.runs(kind="grid")
    page = browser.see(f"/experiments/{grid.info.experiment_id}/runs/{grid.info.run_id}", "grid", "no verdict")
    assert "these two networks differ by" in page
    assert f"get-artifact?path=label_efficiency.png&run_uuid={grid.info.run_id}" in page
    assert "surface Dice" in page
    files = {one.path for one in browser.tracker.client.list_artifacts(grid.info.run_id)}
    assert {"answer.csv", "label_efficiency.png"} <= files


def test_a_trial_leads_to_its_network(browser: Browser) -> None:
    """Its page names the model and its registered version, and begins with results."""
    run = browser.tracker.client.get_model_version_by_alias("fake-segmenter", "best").run_id
    page = browser.see(f"/runs/{run}", "trial", "fake-segmenter")
    assert "n12-pretrained" in page
    assert "12 labelled, pretrained" in page


def test_the_registry_has_the_best_of_the_study(browser: Browser) -> None:
    """Under the study's name, with the alias and where it comes from."""
    page = browser.see("/models/fake-segmenter", "registry", "Version 1")
    assert "fake-segmenter" in page
    assert "best" in page
