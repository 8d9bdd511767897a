"""A page in headless Chromium without network."""

import html
import json
import re
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def open_page(path, profile, *options):
    """Return what Chromium printed for a page (.stdout: the page as drawn) and reported (.stderr)."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"),
        *("--virtual-time-budget=8000", *options, path.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def check_page(path, profile, least_figures):
    """Check that there is no message on the console and that every figure is drawn."""
    done = open_page(path, profile, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    num_figures = path.read_text().count("Plotly.newPlot(")
    assert num_figures >= least_figures
    assert done.stdout.count('class="modebar-container"') == num_figures  # plotly adds it when a figure is drawn


# Chromium's own windows are at least 500 pixels wide; a frame has any width.
FRAME = """<body style="margin:0">
<iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="seen"></pre><script>
setTimeout(() => {{
  const page = document.getElementById("page").contentDocument, root = page.documentElement;
  const plots = [...page.querySelectorAll(".js-plotly-plot")].map(plot => plot.getBoundingClientRect().right);
  document.getElementById("seen").textContent = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, plots,
    background: page.defaultView.getComputedStyle(page.body).backgroundColor,
  }});
}}, 6000);
</script>"""


def measure_page(path, profile, width, dark):
    """What a page looks like in a frame: its width, the width that it needs, where its figures end, its background."""
    frame = path.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, page=html.escape(path.read_text(), quote=True)))
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    done = open_page(frame, profile, "--window-size=1400,1000", *scheme, "--dump-dom")
    frame.unlink()
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1]))
