"""The built-in data set: cartoon faces of five drawing styles (= classes) whose attributes are known exactly.

    python extras/avatars.py out/avatars                        # 12,000 faces, 64 x 64
    python extras/avatars.py out/tiny/avatars --n 200 --seed 1  # tiny

What may be drawn stands in avatars.json. The same (n, size, seed) gives the same bytes.
"""
import csv
import functools
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from common import UserError  # noqa: E402

# avatars.json; the random draws follow its order
#   colors      part -> family -> its shades; attribute "<part>_<family>"
#   styles      one entry per drawing style:
#     zoom      base scale, such that the tallest hair still fits
#     over      draw this many times larger and average down: this style is drawn without antialiasing
#     colors    which dicebear colours a family paints (not micah's beard: a dark one covers the mouth)
#     fixed     options that are the same in every image
#     parts     component -> groups [weight, attributes of the group, its variants; "" = leave it out].
#               Variants whose difference cannot be seen at 64 x 64 are left out or share a group
#   asymmetric  styles in three-quarter view, so that a mirrored image can be told: these have `flipped`
#   hides       when all attributes on the left hold, those on the right (a prefix is enough) cannot be seen
#               and are 0. White clothes hide the print, which is white
TABLES = json.loads(Path(__file__).with_name("avatars.json").read_text("utf-8"))
COLORS, STYLES = TABLES["colors"], TABLES["styles"]


def vocabulary(style):
    """Names of the attributes that apply to `style`, in a fixed order."""
    s = STYLES[style]
    groups = [group for component in s["parts"].values() for group in component]
    names = [name for _, attributes, _ in groups for name in attributes.split()]
    names += [f"{part}_{family}" for part in ("background", *s["colors"]) for family in COLORS[part]]
    if style in TABLES["asymmetric"]:
        names.append("flipped")
    return list(dict.fromkeys(names))


def draw_options(style, rng):
    """Draw one avatar: (every dicebear option, set of attributes that are 1). Units: degrees, percent."""
    def pick(seq):  # rng.random() is the one draw whose stream numpy keeps across releases
        return seq[int(rng.random() * len(seq))]

    def uniform(low, high):
        return round(low + (high - low) * rng.random(), 3)

    s = STYLES[style]
    flip = rng.random() < 0.5
    options = {"flip": "horizontal" if flip else "none",
               "scale": s["zoom"] * uniform(0.9, 1.1),
               "rotate": uniform(-3, 3),
               "translateX": uniform(-3, 3),
               "translateY": uniform(-3, 3),
               **s["fixed"]}
    present = {"flipped"} if flip else set()
    for part, families in COLORS.items():  # a style without the part draws too: the stream stays the same
        family = pick(list(families))
        present.add(f"{part}_{family}")
        painted = "background" if part == "background" else s["colors"].get(part, "")
        for name in painted.split():
            options[name + "Color"] = pick(families[family].split())
    for component, groups in s["parts"].items():
        weights = np.cumsum([weight for weight, _, _ in groups])
        drawn = int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
        _, attributes, variants = groups[drawn]
        options[component + "Probability"] = 100 if variants else 0
        if variants:
            variant = pick(variants.split())
            options[component + "Variant"] = "variant" + variant if variant.isdigit() else variant
        present.update(attributes.split())
    for cover, hidden in TABLES["hides"].items():
        if present.issuperset(cover.split()):
            present = {name for name in present if not name.startswith(tuple(hidden))}
    return options, present


def read_style(style):
    """dicebear's own description of a style: its shapes and, under "meta", its licence."""
    return json.loads((resources.files("dicebear_styles") / f"{style}.json").read_text("utf-8"))


@functools.lru_cache(None)
def load_style(style):
    from dicebear import Style
    return Style(read_style(style))


def render_avatar(job):
    """Write image i and return its row of attributes; depends on (seed, i) alone. Runs in a worker."""
    folder, i, size, seed, styles = job
    import resvg_py
    from dicebear import Avatar
    style = styles[i % len(styles)]
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
    options, present = draw_options(style, rng)
    over = STYLES[style].get("over", 1)
    svg = Avatar(load_style(style), {**options, "size": over * size}).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    file = f"{style}/{i:05d}.png"
    Image.open(io.BytesIO(png)).convert("RGB").reduce(over).save(Path(folder, file))
    return {"file": file, **{name: int(name in present) for name in vocabulary(style)}}


def assign_splits(rows, seed):
    """1/12 of the rows is validation, 1/12 test, the rest training."""
    n = len(rows)
    key = np.array([seed, 2**64 - 1], np.uint64)  # apart from the key of every image
    order = np.argsort(np.random.Generator(np.random.Philox(key=key)).random(n))
    for rank, i in enumerate(order):
        rows[i]["split"] = "val" if rank < n // 12 else "test" if rank < 2 * (n // 12) else "train"


def render_avatars(out, n, size, seed, styles=tuple(STYLES)):
    """Render n cartoon faces, size x size pixels, into folder `out`: <style>/<index>.png, attributes.csv
    (0/1, empty = the style has no such attribute) and avatars.json (settings and licences).

    Raises UserError when a package is missing or `out` holds something else.
    """
    try:
        import dicebear  # noqa: F401
        import dicebear_styles  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as e:
        raise UserError(f"cannot draw avatars ({e}): pip install -r requirements-dev.txt") from None
    out, part = Path(out), Path(f"{out}.part")
    packages = {p: metadata.version(p) for p in ("dicebear-core", "dicebear-styles", "resvg-py")}
    drawing = 2  # a new number when the same seed draws other images
    settings = {"n": n, "size": size, "seed": seed, "drawing": drawing, "packages": packages}
    settings["only"] = list(styles) if len(styles) < len(STYLES) else None
    if out.exists():
        record = out / "avatars.json"
        found = common.read_json(record) if record.is_file() else {}
        found = {k: found.get(k) for k in settings}
        if found == settings and (out / "attributes.csv").is_file():
            return print(f"{out}: already rendered")
        raise UserError(f"{out} exists but is not this data set: found {found}, expected {settings}; "
                        "choose another folder")
    begin = time.time()
    common.open_out(out.parent)
    common.claim(f"{out}.lock", flag="folder")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    for style in styles:
        common.open_out(part / style)
    jobs = [(str(part), i, size, seed, styles) for i in range(n)]
    with multiprocessing.get_context("spawn").Pool(max(1, min(os.cpu_count() or 1, n // 100))) as pool:
        drawn = pool.imap(render_avatar, jobs, chunksize=32)
        rows = list(tqdm(drawn, "avatars", n, unit="image", disable=None))
    assign_splits(rows, seed)
    names = list(dict.fromkeys(name for style in styles for name in vocabulary(style)))
    with open(part / "attributes.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["file", "split", *names], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    metas = {style: read_style(style)["meta"] for style in styles}
    licences = {s: {k: meta[k] for k in ("license", "creator", "source")} for s, meta in metas.items()}
    settings = {k: v for k, v in settings.items() if v is not None}
    text = json.dumps({**settings, "styles": licences}, indent=2, ensure_ascii=False)
    (part / "avatars.json").write_text(text + "\n", "utf-8")
    part.rename(out)
    print(f"{out}: {n} images, {len(names)} attributes, {time.time() - begin:.0f} s")


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("out", help="folder to write")
    p.add_argument("--n", type=common.positive, default=12000, help="images (default 12000)")
    p.add_argument("--size", type=common.side, default=64, help="pixels a side (default 64)")
    p.add_argument("--seed", type=common.seed, default=0)
    p.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), help="default: all five")
    args = p.parse_args()
    render_avatars(args.out, args.n, args.size, args.seed, tuple(s for s in STYLES if s in args.styles))


if __name__ == "__main__":
    common.run_script(main)
