"""A page in a real browser, where there is one: Debian's chromium-headless-shell, or any chromium."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars"]

# Runs before all else in the page, and when it is loaded writes what happened into it.
PROBE = """<script>
const problems = [];
addEventListener("error", (event) => problems.push(String(event.message || event.target.tagName)), true);
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective + " " + event.blockedURI));
addEventListener("load", () => {
  const result = (() => { %s })();
  const entries = performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !name.startsWith("data:"));
  const report = document.createElement("pre");
  report.id = "probe";
  report.textContent = JSON.stringify({ result, problems, requested: entries });
  document.body.append(report);
});
</script>"""


def open_page(page: Path, script: str, width: int = 1280) -> dict[str, Any]:
    """Loads a copy of the page, runs the body of a function in it, and returns what came of it.

    Returns:
      result: of the script; problems: errors and violations of its policy; requested: what was asked of files or a network;
      console: what the browser logged of it.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if not browser:
        pytest.skip(f"no browser on PATH: none of {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "page.html"
        text = page.read_text(encoding="utf-8")
        assert "<title>" in text
        copy.write_text(text.replace("<title>", PROBE % script + "<title>", 1), encoding="utf-8")
        # Nothing that the page might ask of the network is there.
        flags = [f"--user-data-dir={scratch}/profile", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
        command = [browser, *FLAGS, *flags, f"--window-size={width},900", "--dump-dom", copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])) | {"console": [line for line in done.stderr.splitlines() if ":CONSOLE" in line]}
