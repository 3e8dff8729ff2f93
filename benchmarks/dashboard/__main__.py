"""`python -m benchmarks.dashboard`: build the pages from the committed results, and serve them.

Needs asv and matplotlib (`pip install '.[bench]'`) and npm, which fetches the scripts of asv's
pages. The folder that is built is complete: it needs no internet and no server of its own.
"""

from __future__ import annotations

import argparse
import http.server
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import ROOT
from benchmarks.bring_home import RESULTS
from benchmarks.dashboard import readme, site


def serve(folder: Path, port: int) -> None:
    """Serve the pages until interrupted."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    try:
        made = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise SystemExit(f"--port {port}: {error}") from None
    with made as server:
        print(f"http://127.0.0.1:{server.server_port}/ (interrupt to stop)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__)
    parser.add_argument("--html", type=Path, default=ROOT / ".asv/site", help="folder to build")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scripts", type=Path, help="node_modules to take, instead of npm's")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--build-only", action="store_true", help="do not serve")
    parser.add_argument("--readme", action="store_true", help="write the README's table, and stop")
    options = parser.parse_args(argv)
    if options.readme:
        readme.write(options.results)
        return 0
    site.build(options.html, options.results, options.scripts)
    print(options.html / "index.html")
    if not options.build_only:
        serve(options.html, options.port)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
