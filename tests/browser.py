"""A page in headless Chromium: what it asks the network for, and what it says in the console."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OWN = re.compile(r"(update|optimizationguide-pa|content-autofill|safebrowsing\w*)\.googleapis\.com|"
                 r"(clients\d|accounts|redirector|www)\.(google|gvt1)\.com")  # fmt: skip
"""hosts that Chromium itself asks, whatever the page"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr", "--virtual-time-budget=5000")  # fmt: skip


class Opened(NamedTuple):
    requests: list[str]
    """URLs, or `CONNECT host:port` for https, besides that of the page"""
    console: list[str]
    screenshot: Path


def open_page(html: bytes, folder: Path, size: tuple[int, int]) -> Opened:
    """Open a page at `size` pixels behind a proxy that serves it and nothing else, and writes down what is asked."""
    seen: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            seen.append(self.path)
            self.send_response(200 if self.path == "http://report.test/" else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html if self.path == "http://report.test/" else b"")

        def do_CONNECT(self) -> None:  # noqa: N802
            seen.append(f"CONNECT {self.path}")
            self.send_error(502)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    picture = folder / f"{size[0]}.png"
    try:
        command = [str(CHROMIUM), *FLAGS, f"--proxy-server=http://127.0.0.1:{server.server_address[1]}",
                   f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}",
                   f"--screenshot={picture}", "http://report.test/"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0 and picture.exists() and "http://report.test/" in seen, done.stderr[-2000:]
    asked = [url for url in seen if url != "http://report.test/" and not OWN.search(url)]
    return Opened(asked, [line for line in done.stderr.splitlines() if ":CONSOLE" in line], picture)
