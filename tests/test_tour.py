"""Slow test: the notebook."""
import base64
import json
import os
import subprocess
import sys

from helpers import HERE


def test_tour():
    """docs/tour.ipynb no longer runs from top to bottom with the shipped weights, from its own folder."""
    cells = json.loads((HERE / "docs/tour.ipynb").read_text("utf-8"))["cells"]
    assert len(cells) <= 30
    drawn = [o.get("data", {}).get("image/png", "") for c in cells for o in c.get("outputs", [])]
    assert (HERE / "results/tour.png").read_bytes() in map(base64.b64decode, drawn)  # README's
    code = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE / "docs", capture_output=True, text=True,
                          env={**os.environ, "MPLBACKEND": "Agg"})
    assert done.returncode == 0 and "F1 on the images" in done.stdout, done.stderr[-2000:]
