"""A page in headless Chromium without network."""

import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def open_page(path, profile, *options):
    """What Chromium printed (.stdout: the page as it was drawn) and reported (.stderr) for a page."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"),
        *("--virtual-time-budget=8000", *options, path.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def check_page(path, profile, least_figures):
    """Nothing is reported on its console and every figure is drawn."""
    done = open_page(path, profile, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    num_figures = path.read_text().count("Plotly.newPlot(")
    assert num_figures >= least_figures
    assert done.stdout.count('class="modebar-container"') == num_figures  # plotly adds it when a figure is drawn
