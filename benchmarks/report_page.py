"""Opens the page of `hardbatch report` in Chromium, and checks what only a browser can see.

    python benchmarks/report_page.py SHARDS [--screenshots DIR]

On a desktop and on a phone, in light and in dark: is every plot drawn, does nothing run out of the page, and can all
text be read on its background? It needs Chromium (Debian's package `chromium`), so the tests do not run it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hardbatch.pipeline.views.html import report_html

WIDTHS = {"desktop": 1_200, "phone": 390}
SCHEMES = {"light": 1, "dark": 0}  # Blink's numbers of preferred colour schemes
LEAST_CONTRAST = 4.5  # of text, by WCAG 2 (level AA)

# What the page tells about itself, once it is laid out, in an element that the dump of the page holds.
_MEASURE = """<script>
document.documentElement.style.width = 'WIDTHpx';  // a window is never as narrow as a phone
const area = e => { const r = e.getBoundingClientRect(); return r.width * r.height; };
const drawn = s => [...document.querySelectorAll(s)].filter(e => area(e) > 1).length;
const all = s => document.querySelectorAll(s).length;
const rgb = c => c.match(/[\\d.]+/g).map(Number);
const light = c => rgb(c).slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const back = getComputedStyle(document.body).backgroundColor;
const contrast = e => { const a = light(getComputedStyle(e).color), b = light(back);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
document.querySelectorAll('details').forEach(d => d.open = true);
const pre = document.createElement('pre'); pre.id = 'measured';
const right = e => e.getBoundingClientRect().right;
const inPage = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll > *'));
pre.textContent = JSON.stringify({ back, overflow: Math.max(...inPage.map(right)) - WIDTH,
  plots: Object.fromEntries(['.stack', '.line', '.mark', '.histogram', '.histogram i', 'svg', 'circle', 'table']
    .map(s => [s, [drawn(s), all(s)]])),
  contrast: Math.min(...[...document.querySelectorAll('h1,h2,h3,p,li,td,summary,figcaption,span')].map(contrast)) });
document.body.append(pre);
</script>"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of each")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not installed: apt install chromium")

    faults: list[str] = []
    with TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        report = report_html(options.shards)
        for device, width in WIDTHS.items():
            script = _MEASURE.replace("WIDTH", str(width))
            page.write_text(report.replace("</body>", f"{script}</body>"), encoding="utf-8")
            for scheme, number in SCHEMES.items():
                words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
                words += [f"--window-size={max(width, 500)},900", f"--blink-settings=preferredColorScheme={number}"]
                dumped = subprocess.run(
                    [*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True
                )
                found = re.search(r'<pre id="measured">(.*?)</pre>', dumped.stdout, re.DOTALL)
                assert found is not None, "the page did not run its script"
                measured = json.loads(unescape(found[1]))
                faults += [f"{device}, {scheme}: {fault}" for fault in _faults(measured)]
                print(f"{device}, {scheme}: {json.dumps(measured)}")
                if options.screenshots is not None:
                    options.screenshots.mkdir(parents=True, exist_ok=True)
                    picture = options.screenshots / f"{device}-{scheme}.png"
                    tall = [*words, f"--window-size={width},5000", f"--screenshot={picture}"]
                    subprocess.run([*tall, page.as_uri()], capture_output=True, check=True)
    print("\n".join(faults) or "no fault")
    return int(bool(faults))


def _faults(measured: dict[str, Any]) -> list[str]:
    faults = [
        f"{drawn} of {number} elements {selector} are drawn"
        for selector, (drawn, number) in measured["plots"].items()
        if drawn < number or (number == 0 and selector not in ("svg", "circle"))
    ]
    if measured["overflow"] > 0:
        faults.append(f"the page is {measured['overflow']} pixels wider than the screen")
    if measured["contrast"] < LEAST_CONTRAST:
        faults.append(f"some text has a contrast of {measured['contrast']:.1f}")
    return faults


if __name__ == "__main__":
    raise SystemExit(main())
