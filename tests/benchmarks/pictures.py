"""Takes the README's picture of a report.

    python tests/benchmarks/pictures.py [--report runs/kfp/JOB/linear-eval/report] [--output docs/images/report.png]

Without --report, the newest under runs/. Needs chromium.
"""

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.browser import browsing

PROJECT = Path(__file__).absolute().parents[2]
_WIDTH = 1080
_SHOWN = """
    nav, footer, section:not(#u):not(#neighbours):not(#map), #u .chart, .legend { display: none !important }
    .neighbours > :nth-child(n + 19), .row > :nth-child(n + 9) { display: none !important }
    header { padding-top: 1.6rem; border: 0 } section { padding: 1.5rem 0 } header .stats { margin-bottom: 1.2rem }
    #u { border-top: 1px solid var(--line) } main { padding-bottom: .6rem }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the README's picture of a report.", allow_abbrev=False)
    parser.add_argument("--report", metavar="FILE", help="the page (default: the newest under runs/)")
    parser.add_argument("--output", default=str(PROJECT / "docs/images/report.png"), metavar="FILE")
    args = parser.parse_args()
    pages = [Path(args.report)] if args.report else sorted(Path("runs").glob("kfp/*/linear-eval/report"))
    if not pages:
        parser.exit(2, "error: no report under runs/; sogclr run --preset demo makes one\n")
    with tempfile.TemporaryDirectory() as scratch, browsing(Path(scratch, "browser")) as browser:
        page = Path(scratch, "report.html")
        page.write_bytes(pages[-1].read_bytes())
        size = {"width": _WIDTH, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        browser.open(page)
        browser.evaluate(f"document.head.append(Object.assign(document.createElement('style'), {{textContent: `{_SHOWN}`}}))")
        height = browser.evaluate("document.querySelector('main').getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": _WIDTH, "height": height, "scale": 1}
        taken = browser.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
    picture = Image.open(io.BytesIO(base64.b64decode(taken))).convert("RGB")
    picture.save(args.output, optimize=True)
    print(f"{args.output}: {picture.width}x{picture.height}, {Path(args.output).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
