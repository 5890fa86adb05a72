"""Slow tests: study."""
import hashlib
import json
import re
import sys
from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from helpers import (
    assert_refused, call, do)
from PIL import Image

import common
import study


def fake_hash(name):
    return hashlib.sha256(str(name).encode()).hexdigest()[:16]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def write_arm(folder, fd, f1, curve, psnr=24.0, vae=True, commit="c0ffee", init="shipped", steps=400,
              precision="bf16"):
    """The files of a finished arm."""
    folder, owner = Path(folder), str(folder).removesuffix("-repa").removesuffix("-long")
    made, vae_hash = dict(command="x.py --out here", commit=commit), fake_hash(owner)
    (folder / "sit").mkdir(parents=True)
    tuned = dict(made=made, steps=200, batch=32, precision=precision, inputs=dict(init=init))
    write_lines(folder / "metrics.jsonl", tuned, dict(step=200, seconds=3.5))
    trained = dict(lr=1, made=made, steps=steps, batch=64, precision=precision,
                   inputs=dict(latents=f"{vae_hash}-files"))
    measured = ({"step": s, "FD(net@96)-500": v} for s, v in curve)
    write_lines(folder / "sit/metrics.jsonl", trained, *measured, dict(step=curve[-1][0], seconds=9.5))
    scores = dict(fd=fd, rfd=fd / 4, fd_to_reconstructions=fd / 2, precision=0.4, recall=0.3)
    scores["class_agreement"] = 0.9

    def judged(net, scale):
        inputs = {"vae": vae_hash, "s.npz": fake_hash(folder), "images": "a"}
        return dict(network=net, inputs=inputs, reference="images",
                    fd={"s.npz": fd / scale}, n={"s.npz": 1000},
                    scores={"s.npz": {k: v / scale for k, v in scores.items()}}, floor=17.0, floor_n=500,
                    fd_real={"s.npz": 27.0}, seconds=1)

    records = dict(fd=judged("net@96", 1), fd2=judged("other@64", 2), fd3=judged("vgg16@64", 4),
                   samples=dict(sampler="heun", steps=5, vae_hash=vae_hash, seconds=1))
    if vae:
        records["recon"] = dict(psnr=psnr, ssim=0.8, lpips=0.1, fd=fd / 2, seconds=1,
                                inputs=dict(vae=vae_hash, data="x"))
        results = {"vae.pt": dict(f1=f1, top5_recall=f1 / 2, kde_gini=0.3 + fd / 1000, psnr=psnr,
                                  seconds=3.0),
                   "pixels 18 x 18": dict(f1=0.4), "majority": dict(f1=0.1)}
        records["probe"] = dict(inputs={"data": "y", "vae.pt": vae_hash}, results=results)
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(dict(record, made=made)))


@pytest.fixture
def three_seeds(tmp_path, monkeypatch):
    """A study of three seeds, two of its folders not finished."""
    correlate = study.correlate
    monkeypatch.setattr(study, "correlate", lambda rows: correlate(rows, draws=50))  # 2,000 take a while
    for i in range(3):
        for k, arm in enumerate(("control", "send", "depth1-clean", "lambda3")):
            curve = [(100, 1000.0 - 50 * k), (200, 900.0 - 40 * k + i)]
            write_arm(tmp_path / f"seed{i}/{arm}", 900.0 - 40 * k + i, 0.6 + 0.02 * k + 0.01 * i, curve,
                      psnr=24 + 0.1 * k * (-1) ** i)
        write_arm(tmp_path / f"seed{i}/send-repa", 700.0 + i, None, [(100, 800.0), (200, 700.0)], vae=False)
        write_arm(tmp_path / f"seed{i}/control-repa", 690.0 + i ** 2, None, [(100, 800.0), (200, 690.0)],
                  vae=False, commit=None)
    (tmp_path / "seed2/lambda3/probe.json").unlink()
    (tmp_path / "seed0/half/sit").mkdir(parents=True)
    return tmp_path


def lines_of(text, begin):
    return next(line for line in text.splitlines() if line.startswith(begin))


def assert_drawn(study, name):
    assert f"]({name}.png)" in (study / "report.md").read_text()
    with Image.open(study / f"{name}.png") as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(10 ** 6)) > 20


def test_study_report(three_seeds):
    """A number of the report is not its file's, or an unfinished arm counts."""
    out = do("study", three_seeds)
    assert "left out: seed0/half, seed2/lambda3" in out and "| `send` |" in out
    text = (three_seeds / "report.md").read_text()
    record = json.loads((three_seeds / "rows.json").read_text())
    assert "score 27, one half" in text
    short, text = text[text.index("## In short"):text.index("## Claims")], text[text.index("## Claims"):]
    gain = lines_of(short, "| A SiT learns faster on aligned latents | `send` - `control` | 3 | +0.03 ± ")
    assert "| **+0.020 ± 0.000** | **-45 ± 0** | **-40 ± 0** |" in gain
    assert "| ... beside REPA in the SiT | `send-repa` - `control-repa` | 3 |  |  | " in short
    send = lines_of(text, "| `send` | Send-VAE")
    for part in ("| 24.03 ± 0.12 | 215 ± 0 | 0.630 ± 0.010 | +0.020 [+0.020, +0.020] better |",
                 "| 0.315 ± 0.005 | +0.010 [+0.010, +0.010] better |",
                 "| 861 ± 1 | -40 [-40, -40] better | 430 ± 0 | -20 [-20, -20] better |",
                 "| 430 ± 0 | -20 [-20, -20] better | 215 ± 0 | -10 [-10, -10] better |",
                 "| 0.40 ± 0.00 | 0.30 ± 0.00 |",
                 "| 0.900 ± 0.000 | 1.29 (1.29 to 1.29) |"):
        assert part in send, part
    claims = text[:text.index("## Arms")].splitlines()
    claims = {"".join(line.split(" | ")[1:3]): line for line in claims if line.startswith("| ")}
    assert "| 3 | -40 [-40, -40] | 0.0 | **supported**" in claims["`send` - `control`gFD"]
    assert "**supported**" in claims["`send` - `control`probe F1"]
    assert "up to 0.254" in claims["`control` - `send`PSNR"]
    assert "not run" in claims["`oracle` - `control`gFD"]
    with_repa = claims["`send-repa` - `control-repa`gFD"]
    assert "+9 [" in with_repa and "the opposite is seen" in with_repa
    expected = scipy.stats.t.interval(0.95, 2, np.mean([10, 10, 8]), scipy.stats.sem([10, 10, 8]))
    line = lines_of(text, "| `send-repa` | `send`")
    assert f"| +9 [{expected[0]:+.0f}, {expected[1]:+.0f}] worse |" in line
    assert "Commits of the arms: None, c0ffee" in text and not re.search(r"\bnan\b", text)
    row = next(r for r in record if r["arm"] == "send" and r["seed"] == 1)
    assert len(record) == 17 and row["sources"]["fd"] == str(three_seeds / "seed1/send/fd.json")
    values = dict(fd=861, probe_f1=0.63, recon_fd=430.5, rfd=215.25, fd_to_reconstructions=430.5, fd2=430.5,
                  precision=0.4, fd2_to_reconstructions=215.25, fd3=215.25,
                  curve=[[100, 950.0], [200, 861.0]], curve_mean=905.5)
    assert {k: row[k] for k in values} == values
    correlations = json.loads((three_seeds / "correlations.json").read_text())
    assert correlations["probe_kde_gini"]["pearson"] == pytest.approx(1)
    assert correlations["probe_kde_gini"]["n"] == 4
    assert not {"fd2", "precision", "class_agreement"} & correlations.keys()
    assert lines_of(text, "| probe_f1 |").startswith("| probe_f1 | 0.610 | 0.630 | 0.650 |")
    assert "| `send` | 950 ± 0 (-50 ± 0) | 861 ± 1 (-40 ± 0) |" in text and "At equal loss" not in text
    assert_drawn(three_seeds, "convergence")


def test_a_seed_in_two_precisions(three_seeds):
    """A seed that ran twice counts as two, an arm is compared with a control in another precision, or the
    score of an arm in one precision alone holds that precision's level."""
    for fd, arm in ((950.0, "control"), (880.0, "send"), (930.0, "random")):
        write_arm(three_seeds / f"seed0-fp32/{arm}", fd, 0.6, [(100, 1000.0), (200, fd)], precision="fp32")
    do("study", three_seeds)
    text = (three_seeds / "report.md").read_text()
    assert "3 seeds (seed0 in bf16," in text and "seed0-fp32 in fp32)" in text
    short = text[:text.index("## Claims")]
    assert "`send` - `control` | 3 |" in short and "`random` - `control` |" not in short
    text = text[text.index("## Arms"):]
    send = lines_of(text, "| `send` | Send-VAE")  # -40 and -70, -40, -40; 860 and 880, 861, 862
    low, high = scipy.stats.t.interval(0.95, 2, -45, scipy.stats.sem([-55, -40, -40]))
    for part in ("| 3, bf16, fp32 | 24.02 ± 0.10 | 216 ± 1 |", "| 864 ± 5 |",
                 f"| -45 [{low:+.0f}, {high:+.0f}] better |"):
        assert part in send, part
    assert "-20 (one seed)" in lines_of(text, "| `random` | ")  # of 930 and 950, not 900
    means = {m["arm"]: m["fd"] for m in study.arm_means(study.read_study(three_seeds)[0])}
    assert means["control"] == pytest.approx((925 + 901 + 902) / 3)
    assert means["random"] == pytest.approx(means["control"] - 20)
    (three_seeds / "seed0-fp32").rename(three_seeds / "seed0-copy")
    assert_refused(call("study", three_seeds), "seed0-copy: arms in fp32", "one precision")


def test_pages_show_the_results():
    """README's tables, a report or docs/study.md's correlations are not of the runs that lie in results/."""
    root = Path(__file__).resolve().parent.parent
    tables = {name: study.short_table(study.read_study(root / "results" / name)[0])
              for name in ("study", "study_1000")}
    assert tables["study"] in (root / "README.md").read_text()
    for name, text in tables.items():
        assert text in (root / "results" / name / "report.md").read_text(), name
    found = json.loads((root / "results/study/correlations.json").read_text())
    shown = re.findall(r"`(\w+)`[^|\n]*\| (\S+) \[(\S+), (\S+)\] \|", (root / "docs/study.md").read_text())
    assert len(shown) > 10
    for name, *numbers in shown:
        of = found.get(name) or found[f"probe_{name}"]
        expected = [f"{v:+.2f}" for v in (of["partial"], *of["partial_interval"])]
        assert [f"{float(v):+.2f}" for v in numbers] == expected, name


def test_verdicts():
    """Two seeds decide, or a claim is supported by what contradicts it; ± is not half of the interval."""
    assert study.short_span([-40.0, -41.0, -39.0], "fd") == "**-40 ± 2**"  # t = 4.30, 1 / sqrt 3
    assert study.short_span([-40.0, 41.0, -39.0], "fd") == "-13 ± 115"
    assert study.span_text([-0.6, -0.1, 0.2], 0) == "+0 [-1, +1]"  # no "-0"
    assert study.claim_verdict([-40.0, -41.0], "fd")[0] == "undecided: fewer than three seeds"
    assert study.compared([-40.0, -41.0], "fd") == "undecided"
    assert study.claim_verdict([-40.0, -41.0, -39.0], "fd")[0] == "**supported**"
    assert study.claim_verdict([-40.0, -41.0, -39.0], "psnr")[0].endswith("the opposite is seen")
    reading, visible = study.claim_verdict([-40.0, 41.0, -39.0], "fd")
    rng = np.random.default_rng(0)
    error = np.std([-40, 41, -39], ddof=1)
    tries = [study.interval(rng.normal(visible, error, 3))[0] > 0 for _ in range(4000)]
    assert "up to" in reading and np.mean(tries) == pytest.approx(0.8, abs=0.02)


def test_gain_against_knowledge(three_seeds):
    """The F1 beside an arm is another network's, or of the VAE or the pixels that were probed with it."""
    do("study", three_seeds)
    assert "vision model knows" not in (three_seeds / "report.md").read_text()
    (three_seeds / "shared").mkdir()
    for name, f1 in (("lite0", 0.8), ("oracle", 0.9)):
        results = {"init.pt": dict(f1=0.7), "a_net.v1 3 x 3": dict(f1=f1), "pixels 18 x 18": dict(f1=0.5)}
        common.write_json(three_seeds / f"shared/knows-{name}.json", dict(results=results))
    do("study", three_seeds)
    text = (three_seeds / "report.md").read_text()
    part = text[text.index("## What the vision model knows"):text.index("## SiTs trained longer")]
    assert [line for line in part.splitlines() if line.startswith("| `")] == [
        "| `send` | 0.800 | +0.020 [+0.020, +0.020] better | -45 [-45, -45] better | "
        "-10 [-10, -10] better | +0.03 [-0.25, +0.32] undecided |"]
    assert (three_seeds / "ladder.png").exists() and "](ladder.png)" in part
    (three_seeds / "shared/knows-lite0.json").write_text("{}")
    assert_refused(call("study", three_seeds), "knows-lite0.json", "delete it")


def test_arms_that_are_trained_longer(three_seeds):
    """An arm with ten times the steps enters a table of equal training, or is left out altogether."""
    do("study", three_seeds)
    before = (three_seeds / "report.md").read_text()
    for arm, fd, curve in (("control", 500.0, [(1000, 600.0), (2000, 520.0), (4000, 500.0)]),
                           ("send", 400.0, [(1000, 540.0), (2000, 460.0), (4000, 400.0)])):
        write_arm(three_seeds / f"seed0/{arm}-long", fd, None, curve, vae=False, steps=4000)
    do("study", three_seeds)
    text = (three_seeds / "report.md").read_text()
    assert "| `control-long` | 1 | 4000 | 500 | 250 | 0.400 | 0.300 | 0.900 | 4000 |" in text
    assert "| `send-long` | 1 | 4000 | 400 | 200 | 0.400 | 0.300 | 0.900 | 1500 |" in text
    part = lambda t: t[t.index("## In short"):t.index("## SiTs trained longer")]
    assert part(text) == part(before)
    record = {r["name"]: r for r in json.loads((three_seeds / "rows.json").read_text())}
    assert record["seed0/send-long"]["arm"] == "send-long" and record["seed0/send-long"]["psnr"] == 24.1
    write_arm(three_seeds / "seed1/send-long", 400.0, None, curve, vae=False, steps=5000)
    assert_refused(call("study", three_seeds), "SiT for 4000", "SiT for 5000")


def change_file(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_study_of_what_does_not_belong_together(three_seeds):
    """What cannot be compared is, or a damaged file ends in a traceback."""
    arm = three_seeds / "seed1/send"

    def refused(*words):
        assert_refused(call("study", three_seeds), *words)

    for file, old, new, words in (
            ("probe.json", fake_hash(arm), "another", ["seed1/send", "different VAEs"]),
            ("fd.json", "net@96", "other@96", ["FD(other@96)-1000", "FD(net@96)-1000"]),
            ("metrics.jsonl", "shipped", "another", ["VAE another", "VAE shipped"]),
            ("metrics.jsonl", '"steps": 200', '"steps": 100', ["100 steps of 32", "200 steps of 32"]),
            ("samples.json", "heun", "sde", ["sde 5 steps"]),
            ("sit/metrics.jsonl", "bf16", "fp32", ["seed1: arms in bf16, bf16 and fp32", "one precision"]),
            ("fd.json", '"images": "a"', '"images": "b"', ["images a", "images b"]),
            ("fd3.json", fake_hash(arm), "another", ["seed1/send", "different samples"]),
            ("fd.json", '"rfd"', '"other"', ["seed1/send/fd.json", "no rFD", "--vae"]),
            ("fd.json", '"scores"', '"other"', ["seed1/send", "delete its fd.json"]),
            ("sit/metrics.jsonl", "FD(net@96)", "other", [arm / "sit/metrics.jsonl", "--eval-every"]),
            ("sit/metrics.jsonl", '{"step"', "{", [arm / "sit/metrics.jsonl", "run that arm again"])):
        before = (arm / file).read_text()
        change_file(arm / file, old, new)
        refused(*words)
        (arm / file).write_text(before)
    for i in range(3):
        (three_seeds / f"seed{i}/control/fd.json").unlink()
    refused("no finished seed*/control", "run.sh study")
    assert_refused(call("study", three_seeds / "nothing"), "run.sh study")


def test_report_of_the_demo(tmp_path, monkeypatch):
    """A score of the demo's report is not its arm's, the picture mixes arms up or has no curve, or a missing
    matplotlib takes the table with it."""
    rng, pictures = np.random.default_rng(0), []
    for k, arm in enumerate(("control", "send")):
        write_arm(tmp_path / arm, 900.0 - 40 * k, 0.6 + 0.02 * k, [(100, 1000.0 - 50 * k), (200, 900.0)])
        (tmp_path / arm / "latents").mkdir()
        (tmp_path / arm / "latents/meta.json").write_text(json.dumps(dict(seconds=2)))
        np.savez(tmp_path / arm / "samples.npz", arr_0=rng.integers(0, 256, (40, 8, 8, 3), np.uint8))
        grid = torch.from_numpy(rng.integers(0, 256, (32, 3, 8, 8), np.uint8))
        common.save_grid(grid, tmp_path / arm / "recon.png", columns=8)
        half = grid[16:].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(study.sheet_images(tmp_path / arm / "recon.png", 8, 0.5, 1), half)
    show, plot, plotted = study.show, matplotlib.axes.Axes.plot, []

    def note_picture(axis, images, *args, **settings):
        pictures.append(images)
        return show(axis, images, *args, **settings)

    def note_curve(axis, *args, **settings):
        plotted.append(args)
        return plot(axis, *args, **settings)

    monkeypatch.setattr(study, "show", note_picture)
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", note_curve)
    rows = [dict(arm="send-long", curve_measure="FD(net@96)-500", curve=[[1000, 500.0], [2000, 400.0]]),
            dict(arm="send", curve_measure="FD(net@96)-500", curve=[[1, 1.0]]),
            dict(arm="control-long", curve_measure="another", curve=[[1, 1.0]])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = do("study", "demo", tmp_path, "--study", tmp_path / "rows.json")
    assert re.search(r"fd +900\.0 +860\.0\n", out) and re.search(r"probe_f1 +0\.6000 +0\.6200\n", out)
    assert "control, seconds: encode 2, sample 1, fd 1, recon 1, train_vae 4, train_sit 10" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["arms"]["send"]["fd"] == 860 and report["arms"]["send"]["fd_n"] == 1000
    floors = dict(fd_floor=17.0, fd_floor_n=500, fd_real=27.0)
    assert report["baselines"] == dict(floors, probe_f1_pixels=0.4, probe_f1_majority=0.1)
    assert report["network"] == "net@96" and report["torch"] == torch.__version__
    samples = [np.load(tmp_path / arm / "samples.npz")["arr_0"] for arm in ("control", "send")]
    assert len(pictures) == 5 and all(np.array_equal(a, b) for a, b in zip(pictures, samples))
    assert [p[0] for p in plotted] == [(100, 200), (100, 200), (1000, 2000)]
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(10 ** 6)) > 20
    for arm in ("control", "send"):  # as of run.sh folder: no attributes
        (tmp_path / arm / "probe.json").unlink()
    plotted.clear()
    assert "no probe" in do("study", "demo", tmp_path) and len(plotted) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = call("study", "demo", tmp_path)
    assert_refused(result, "requirements-dev.txt")
    assert re.search(r"fd +900\.0 +860\.0\n", result[1])
    (tmp_path / "send/fd.json").write_text("{}")
    assert_refused(call("study", "demo", tmp_path), "send", "fd.json")


def curves_of(**arms):
    """{arm: {run: row}} of distances at 100, 200, 300, 400 steps, a list a seed."""
    def row(seed, values):
        return dict(seed=seed, curve=list(zip((100, 200, 300, 400), values)))

    return {arm: {f"seed{i}": row(i, v) for i, v in enumerate(seeds)} for arm, seeds in arms.items()}


def test_speed_ups():
    """An arm is called faster for chance: seeds in which it is slower do not count, or a control that was
    there before its end is measured at its end."""
    control = [50.0, 40.0, 30.0, 20.0]
    rows = curves_of(control=[control, control], send=[[55.0, 50.0, 40.0, 30.0], [40.0, 20.0, 15.0, 10.0]])
    assert study.speed_ups(rows, "send", "control") == (pytest.approx([0.75, 2.0]), False)
    assert study.speed_ups(rows, "control", "send") == (pytest.approx([4 / 3, 0.5]), False)
    assert study.speed_text(rows, "send") == f"{1.5 ** 0.5:.2f} (0.75 to 2.00)"
    early = curves_of(control=[[50.0, 20.0, 30.0, 25.0]], send=[[50.0, 20.0, 30.0, 25.0]])
    assert study.speed_text(early, "send") == "1.00 (one seed)"  # both were there before their ends
    below = curves_of(control=[control], send=[[19.0, 18.0, 17.0, 16.0]])
    assert study.speed_text(below, "send") == "4.00 (one seed), a bound"
    rng, logs = np.random.default_rng(0), []  # arms that are the control but for noise
    for _ in range(300):
        noisy = np.array([1200, 1090, 1040, 1015]) + rng.normal(size=(2, 4)) * 8
        ratios, _ = study.speed_ups(curves_of(control=noisy[:1], send=noisy[1:]), "send", "control")
        logs.append(np.log(ratios[0]))
    assert abs(np.mean(logs)) < 3 * np.std(logs) / len(logs) ** 0.5


def test_arms_at_equal_psnr(three_seeds):
    """An arm is compared with a weight that costs another PSNR, or with one beyond those that ran."""
    rows = {arm: {"seed0": dict(seed=0, psnr=psnr, fd=fd)} for arm, psnr, fd in (
        ("control", 30, 800.0), ("lambda8", 28, 600.0), ("send", 29, 760.0), ("vavae", 28.25, 630.0),
        ("random", 31, 0.0), ("oracle", 29, 750.0))}
    through = "`control`, `send`, `lambda8`"
    assert study.at_equal_psnr(rows, "oracle", "fd") == ([-10], through)
    # Hermite's cubic at a quarter of 28 to 29, of slopes 220 and 64 by Fritsch and Carlson
    cubic = 600 * 0.84375 + 220 * 0.140625 + 760 * 0.15625 - 64 * 0.046875
    assert study.at_equal_psnr(rows, "vavae", "fd")[0] == pytest.approx([630 - cubic])
    assert study.at_equal_psnr(rows, "random", "fd") == ([], "")
    for arm in ("control", "send", "oracle"):  # another run, of two weights
        rows[arm]["seed1"] = dict(rows[arm]["seed0"], seed=1)
    assert study.at_equal_psnr(rows, "oracle", "fd") == ([-10], through)
    for seed in range(3):  # lambda8 has half the PSNR and twice the distance of control, depth1-clean between
        write_arm(three_seeds / f"seed{seed}/lambda8", 1800.0, 0.6, [(100, 2000.0), (200, 1800.0)], psnr=12)
        change_file(three_seeds / f"seed{seed}/depth1-clean/recon.json", '"psnr": 2', '"psnr": 1')
        for arm in ("control-fsq", "send-fsq"):  # these have a control of their own
            write_arm(three_seeds / f"seed{seed}/{arm}", 900.0, 0.6, [(100, 1000.0), (200, 900.0)], psnr=18)
    do("study", three_seeds)
    text = (three_seeds / "report.md").read_text()
    part = text[text.index("## At equal loss of PSNR"):text.index("## SiTs trained longer")]
    assert "| `depth1-clean` | `control`, `send`, `lambda8` | 3 | " in part
    assert "-fsq" not in part
