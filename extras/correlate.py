"""Does a score of a VAE predict how well a diffusion model does on its latents?

    python extras/correlate.py out/demo out/demo_1 out/demo_2 --png scatter.png   # folders of run.sh
    python extras/correlate.py out/imagenet/*/SiT-B-1 --json correlations.json
    python extras/correlate.py --paper                                            # Tables 7 and 8

Sets every score of the VAEs against the Fréchet distance of the samples: Pearson, Spearman, and the partial
correlation given PSNR, with intervals over resampled runs. What it says of few runs is "undecided".
"""
import io
import sys
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
from common import UserError, read_json  # noqa: E402

# Tables 7 and 8 of the paper; the distance is the gFID of SiT-B/1 + REPA
PAPER = [dict(name="IN-VAE", psnr=28.59, celeba_f1=.6222, deepfashion_f1=.0786, awa_f1=.5567, fd=17.43),
         dict(name="VA-VAE", psnr=27.96, celeba_f1=.6347, deepfashion_f1=.1094, awa_f1=.5948, fd=11.40),
         dict(name="E2E-VAE", psnr=27.63, celeba_f1=.6439, deepfashion_f1=.1177, awa_f1=.6441, fd=8.96),
         dict(name="Send-VAE", psnr=27.62, celeba_f1=.6647, deepfashion_f1=.1385, awa_f1=.6623, fd=7.57)]
NEEDED = 8  # runs, and kinds of VAE, below which nothing is said of a score

# Scores of samples, not of a VAE
SAMPLE_SCORES = ("fd", "curve_mean", "fd2", "fd3", "fd_n", "fd_to_reconstructions", "fd2_to_reconstructions",
                 "precision", "recall", "precision_to_reconstructions", "recall_to_reconstructions",
                 "class_agreement", "class_agreement_real", "sfid", "inception_score")


# ------------------------------------------------------------------------------------------------------------
# Rows: one a VAE and SiT


def numbers(record, prefix=""):
    return {prefix + k: v for k, v in record.items() if isinstance(v, float) and k not in ("psnr", "seconds")}


def read_report(path):
    """Rows of the arms of RUN/report.json."""
    report = read_json(path / "report.json")
    return [dict(numbers(arm), name=f"{path}/{name}", run=str(path), arm=name, psnr=arm["psnr"],
                 measure=f"FD({report['network']})-{arm['fd_n']}") for name, arm in report["arms"].items()]


def read_sit(file):
    """The row of ARM/SiT-*/samples.npz.json, with ARM/recon.json and ARM/probe.json."""
    arm, score = file.parent.parent, read_json(file)
    (fd,), (n,) = score["fd"].values(), score["n"].values()
    probed = next(iter(read_json(arm / "probe.json")["results"].values()))
    measure = f"FD({score['network']})-{n} of {file.parent.name}"
    return dict(numbers(probed, "probe_"), name=str(file.parent), run=str(arm), measure=measure, fd=fd,
                psnr=read_json(arm / "recon.json")["psnr"])


def read_run(path):
    """Rows {name, run, arm (the kind of VAE), measure (network, count and SiT of the distance), psnr, fd,
    scores...}: of each arm of RUN/report.json; of one SiT, or all, of an arm of run.sh imagenet; or of a
    .json list of such rows, in which run and measure may be missing. Raises UserError."""
    path = Path(path).parent if Path(path).name == "report.json" else Path(path)
    try:
        if not path.is_dir():
            rows = read_json(path, list)
            return [dict({"run": f"{path}:{i}", "measure": ""}, **row) for i, row in enumerate(rows)]
        if (path / "report.json").exists():
            return read_report(path)
        files = [*path.glob("samples.npz.json"), *path.glob("SiT-*/samples.npz.json")]
        rows = [read_sit(file) for file in sorted(files)]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: no runs in what is written there ({type(e).__name__}: {e}); expected the "
                        "report.json of study.py demo, or rows with name, psnr, fd and scores") from None
    if not rows:
        raise UserError(f"{path}: neither report.json nor samples.npz.json nor SiT-*/samples.npz.json; "
                        "expected a folder of run.sh")
    return rows


def is_number(v):
    return isinstance(v, (int, float)) and np.isfinite(v)


def check_rows(rows):
    """Raise UserError for rows that cannot be compared."""
    for r in rows:
        for k in ("psnr", "fd"):
            if not is_number(r.get(k)):
                raise UserError(f"{r.get('name', r)} has no {k}; every row needs finite numbers psnr and fd")
    measures = {str(r["measure"]): r.get("name") for r in rows}
    if len(measures) > 1:
        raise UserError("distances of other networks, counts or SiTs do not mix; found "
                        + "; ".join(f"{m} in {n}" for m, n in measures.items()))
    names = [r["name"] for r in rows if "name" in r]
    if len(set(names)) < len(names):
        raise UserError(f"{max(names, key=names.count)} is given twice; expected different runs")
    if len(rows) < 3:
        raise UserError(f"{len(rows)} rows (a run of the demo has two, its arms); a correlation needs three: "
                        "name further runs")


def kind_of(row):
    """The kind of VAE: its arm, or where that is not said its name."""
    return str(row.get("arm", row.get("kind", row.get("name", ""))))


def shared_scores(rows):
    """Names of the scores of a VAE that every row has; those of samples are what is predicted."""
    others = ("name", "run", "arm", "kind", "seed", "measure", "psnr", *SAMPLE_SCORES)
    return [k for k in rows[0] if k not in others and all(is_number(r.get(k)) for r in rows)]


# ------------------------------------------------------------------------------------------------------------
# Statistics


def correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan


def rank_correlation(x, y):
    return correlation(scipy.stats.rankdata(x), scipy.stats.rankdata(y))


def partial_correlation(x, y, given):
    """Pearson correlation of x and y given a third, (n,) each -> float; nan where nothing is left of one."""
    xy, xz, yz = correlation(x, y), correlation(x, given), correlation(y, given)
    rest = (1 - xz ** 2) * (1 - yz ** 2)
    return (xy - xz * yz) / rest ** 0.5 if rest > 1e-12 else np.nan


def correlate(rows, draws=2000):
    """For each score that all rows have: Pearson, Spearman and partial correlation (given PSNR) with the
    distance `fd`, each with the middle 95 % over resampled runs (arms of one run share seed and data: they
    are drawn together) -> {score: {n, runs, kinds, statistic: value, statistic_interval: (low, high)}}; None
    where it is not defined."""
    fd, quality = (np.array([r[k] for r in rows], np.float64) for k in ("fd", "psnr"))
    runs = {}
    for i, r in enumerate(rows):
        runs.setdefault(str(r.get("run", i)), []).append(i)
    members, generator = list(runs.values()), np.random.Generator(np.random.Philox(key=3))
    picks = [sum((members[g] for g in generator.integers(len(members), size=len(members))), [])
             for _ in range(draws)]
    out = {}
    for name in ["psnr", *shared_scores(rows)]:
        x = np.array([r[name] for r in rows], np.float64)
        statistics = dict(pearson=(correlation, x, fd), spearman=(rank_correlation, x, fd))
        if name != "psnr":
            statistics["partial"] = partial_correlation, x, fd, quality
        out[name] = dict(n=len(rows), runs=len(members), kinds=len(set(map(kind_of, rows))))
        for k, (statistic, *columns) in statistics.items():
            value = statistic(*columns)
            drawn = np.array([statistic(*(c[i] for c in columns)) for i in picks])
            drawn = drawn[np.isfinite(drawn)]
            out[name][k] = value if np.isfinite(value) else None
            out[name][f"{k}_interval"] = None
            if len(drawn) > 0.9 * draws:
                out[name][f"{k}_interval"] = tuple(np.quantile(drawn, (0.025, 0.975)).tolist())
    return out


def verdict(r):
    """What the rows say of a score, in words: r is its entry of correlate(). Seeds of the same two arms are
    no evidence that a score predicts: whatever one arm changes would follow the distance. So different kinds
    of VAE are counted, not rows."""
    if "partial" not in r:
        return "the yardstick"
    few = min(r["runs"], r["kinds"])
    if few < NEEDED:
        return f"undecided: {few} {'runs' if few == r['runs'] else 'kinds of VAE'}, {NEEDED} are needed"
    span = r["partial_interval"]
    if r["partial"] is None or span is None or span[0] <= 0 <= span[1]:
        return "undecided: the partial interval holds 0"
    return f"follows the distance beyond PSNR ({'lower' if r['partial'] > 0 else 'higher'} is better)"


# ------------------------------------------------------------------------------------------------------------
# Figures


def new_figure(width, height):
    """A matplotlib figure, in inches. Raises UserError when the package is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"cannot draw the figure ({e}): pip install -r requirements-dev.txt") from None
    return Figure((width, height), layout="constrained")


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="white")
    common.save_png(Image.open(buffer).convert("RGB"), path)


def kind_colours(kinds):
    """Black for the control, red for Send-VAE, no other red: {kind: colour}, the same in every figure."""
    import matplotlib
    order = [0, 2, 4, 8, 10, 12, 14, 16, 18, 1, 3, 5, 9, 11]
    others = [k for k in dict.fromkeys(kinds) if k not in ("control", "send")]
    colours = {k: matplotlib.colormaps["tab20"](order[i % len(order)]) for i, k in enumerate(others)}
    return {"control": "black", "send": "crimson", **colours}


def scatter_figure(rows, result):
    """Score across, distance up: a dot a row, a disc for the mean of each kind of VAE. One panel a score, and
    one for the legend. result: of correlate()."""
    across, down = 4, len(result) // 4 + 1
    figure, colours = new_figure(4 * across, 3.4 * down), kind_colours(map(kind_of, rows))
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, (name, r) in zip(axes, result.items(), strict=False):
        for kind in dict.fromkeys(map(kind_of, rows)):
            x, y = np.array([(r[name], r["fd"]) for r in rows if kind_of(r) == kind], float).T
            axis.plot(x, y, ".", color=colours[kind], markersize=5, alpha=0.5)
            axis.plot(x.mean(), y.mean(), "o", color=colours[kind], markersize=8, label=kind)
        axis.set(xlabel=name, ylabel="Fréchet distance")
        pearson = "undefined" if r["pearson"] is None else f"{r['pearson']:+.2f}"
        partial = "" if r.get("partial") is None else f", given PSNR {r['partial']:+.2f}"
        axis.set_title(f"r {pearson}{partial}, n = {r['n']}", fontsize=10)
    for axis in axes[len(result):]:
        axis.axis("off")
    axes[len(result)].legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="center")
    return figure


# ------------------------------------------------------------------------------------------------------------


def print_result(result):
    def cell(r, k):
        if k not in r:
            return ""
        span = r[f"{k}_interval"]
        span = f"[{span[0]:+.2f}, {span[1]:+.2f}]" if span else "[undefined]"
        return "undefined" if r[k] is None else f"{r[k]:+.2f} {span}"

    n = result["psnr"]["n"]
    print(f"{'with the distance (lower is better)':36} {'Pearson':>22} {'Spearman':>22} "
          f"{'partial, given PSNR':>22}   n = {n}")
    for name, r in result.items():
        cells = " ".join(f"{cell(r, k):>22}" for k in ("pearson", "spearman", "partial"))
        print(f"{name:36} {cells}   {verdict(r)}")
    if len(result) > 5:
        print(f"{len(result)} scores were tried: of those without any relation about one in 20 leaves 0 "
              "outside its interval by chance.")


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("runs", nargs="*", help="folders of run.sh (out/demo, out/imagenet/ARM/SiT-B-1), or .json "
                   "lists of rows (name, psnr, fd, scores)")
    p.add_argument("--paper", action="store_true", help="the paper's own four rows (Tables 7 and 8)")
    p.add_argument("--png", help="draw the scatter here")
    p.add_argument("--json", help="write all numbers here")
    args = p.parse_args()
    if args.paper == bool(args.runs):
        raise UserError("expected the folders of runs, or --paper, and not both")
    rows = [dict(r, run=r["name"], measure="") for r in PAPER] if args.paper else \
        [r for path in args.runs for r in read_run(path)]
    check_rows(rows)
    for flag in ("png", "json"):
        if getattr(args, flag):
            common.open_file(getattr(args, flag), f"--{flag}")
    result = correlate(rows)
    lost = {k for r in rows for k in numbers(r)} - {"fd", *result}
    if lost:
        print(f"left out, not in every row: {', '.join(sorted(lost))}")
    print_result(result)
    if args.paper:
        print("Four VAEs: they show that probe scores rise as gFID falls. They cannot show why: PSNR follows "
              f"gFID as closely\n({result['psnr']['pearson']:+.2f}), and given PSNR one degree of freedom is "
              "left. Disentanglement and mere\nloss of pixel detail are not told apart by these rows.")
    if args.png:
        save_figure(scatter_figure(rows, result), args.png)
    if args.json:
        common.write_json(args.json, dict(rows=rows, correlations=result))


if __name__ == "__main__":
    common.run_script(main)
