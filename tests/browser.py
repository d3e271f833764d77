"""A real browser, without a window, for pages that stand by themselves."""

import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
WHY_NOT = "no chromium on this machine"


def browse(page: Path, *arguments: str, width: int, height: int = 2000, dark: bool = False) -> tuple[str, str]:
    """(stdout, log) of a browser that shows a page once."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                "--hide-scrollbars",
                "--enable-logging=stderr",
                "--v=0",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                *arguments,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    """What a page made the browser complain of."""
    return [line for line in log.splitlines() if "CONSOLE" in line]
