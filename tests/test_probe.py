"""Slow tests: probe."""
import errno
import functools
import gzip
import json
import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import sklearn.mixture
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    LITE0, assert_refused, call, do, labelled, planted, sklearn_probe, tiny_vae, truncate, write_images,
    write_npz)
from PIL import Image

import attributes
import common
import correlate
import data
import datasets
import fid
import mapper
import probe
import vae
from common import UserError

# ------------------------------------------------------------------------------------------------------------
# probe.py


def test_ill_conditioned_features_converge(capsys):
    """The principal axes do not help: after a few steps the objective is above scikit-learn's; or a stop
    before the minimum is not told."""
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(900, 300)).cumsum(1)).float()  # neighbours are alike, as pixels are
    signal = X.numpy() @ (rng.normal(size=(300, 2)) / 300) + 0.3 * rng.normal(size=(900, 2))
    Y = torch.from_numpy((signal > 0).astype(np.float32))
    fitted = probe.fit_probe(X, Y, X, Y, steps=25)
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    for a in range(2):
        strength, y = fitted.strength[a].item(), Y[:, a]
        C = 1 / (900 * strength)
        peer = sklearn.linear_model.LogisticRegression(C=C, max_iter=20000, tol=1e-8).fit(Z, y.numpy())
        found, least = (
            F.binary_cross_entropy_with_logits(logits, y).item() + 0.5 * strength * np.square(w).sum()
            for logits, w in ((fitted(X)[:, a], (fitted.weight[:, a] * X.std(0)).numpy()),
                              (torch.from_numpy(peer.decision_function(Z)).float(), peer.coef_[0])))
        assert found < 1.01 * least
    assert "stopped at gradient" not in capsys.readouterr().out
    probe.fit_probe(X, Y, X, Y, steps=2)
    assert "strength 0.1 stopped at gradient" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# extras/correlate.py


def score_rows():
    """40 rows: `real` predicts the distance, `copied` follows PSNR alone, `some` is not in every row."""
    rng = np.random.default_rng(0)
    quality, real = rng.normal(size=40), rng.normal(size=40)
    copied = quality + 0.05 * rng.normal(size=40)
    fd = 2 * quality - real + 0.1 * rng.normal(size=40)
    rows = [dict(name=str(i), psnr=q, fd=f, real=r, copied=c, some=1.0)
            for i, (q, f, r, c) in enumerate(zip(quality, fd, real, copied, strict=True))]
    del rows[7]["some"]
    return rows, quality, fd, real, copied


def test_correlations():
    """Pearson, Spearman or the partial correlation differ from their definitions, or a score that only
    follows PSNR is praised."""
    rows, quality, fd, real, copied = score_rows()
    result = correlate.correlate(rows, draws=300)
    assert set(result) == {"psnr", "real", "copied"}
    for name, x in (("psnr", quality), ("real", real), ("copied", copied)):
        assert result[name]["pearson"] == pytest.approx(scipy.stats.pearsonr(x, fd)[0])
        assert result[name]["spearman"] == pytest.approx(scipy.stats.spearmanr(x, fd)[0])
    r = np.corrcoef([real, fd, quality])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert result["real"]["partial"] == pytest.approx(expected)
    assert correlate.verdict(result["real"]) == "follows the distance beyond PSNR (higher is better)"
    assert correlate.verdict(result["copied"]).startswith("undecided")
    assert abs(result["copied"]["pearson"]) > 0.8


def test_few_runs_and_flat_scores_are_undecided():
    """Seeds of the same arms count as evidence, or a score without variance ends in a number."""
    rows, quality, fd, _, _ = score_rows()
    few = correlate.correlate([dict(r, run=str(i % 7)) for i, r in enumerate(rows)], draws=50)["real"]
    assert few["runs"] == 7 and few["n"] == 40 and correlate.verdict(few).startswith("undecided: 7 runs")
    arms = correlate.correlate([dict(r, arm="ab"[i % 2]) for i, r in enumerate(rows)], draws=50)["real"]
    assert arms["runs"] == 40 and correlate.verdict(arms).startswith("undecided: 2 kinds of VAE")
    flat = correlate.correlate([dict(r, flat=1.0) for r in rows], draws=50)["flat"]
    assert flat["pearson"] is None and flat["pearson_interval"] is None and flat["partial"] is None
    assert np.isnan(correlate.partial_correlation(quality, fd, quality))
    assert np.isnan(correlate.correlation(np.ones(5), fd[:5]))


def test_arms_of_a_run_are_drawn_together():
    """The interval treats the arms of one run as independent."""
    rows = [dict(name=f"{run}{arm}", run=run, psnr=20.0 + i, fd=100.0 - 10 * i - arm, score=i + 0.1 * arm)
            for i, run in enumerate("abcdefghij") for arm in (0, 1)]
    alone = lambda rows: [dict(r, run=r["name"]) for r in rows]
    assert correlate.correlate(alone(rows), draws=9)["score"]["runs"] == 20
    assert correlate.correlate(rows, draws=9)["score"]["runs"] == 10
    double = [dict(r, fd=[3.0, 1, 2, 9, 4, 8, 5, 6, 7, 0][i // 2]) for i, r in enumerate(rows)]
    low, high = correlate.correlate(double, draws=400)["psnr"]["pearson_interval"]
    apart = correlate.correlate(alone(double), draws=400)["psnr"]["pearson_interval"]
    assert high - low > 1.2 * (apart[1] - apart[0])  # copies bring no certainty


def test_scatter(tmp_path):
    """A point lies in the wrong place, or has another colour than its kind of VAE in the legend."""
    rows = [dict(name=str(i), arm="ab"[i % 2], psnr=float(i), fd=fd, score=float(-i))
            for i, fd in enumerate((0.0, 10, 5, 7))]
    figure = correlate.scatter_figure(rows, correlate.correlate(rows, draws=20))
    psnr, score, legend, empty = figure.axes
    handles = legend.get_legend().legend_handles
    for axis, sign in ((psnr, 1), (score, -1)):
        dots, discs = axis.lines[::2], axis.lines[1::2]
        places = [line.get_xydata().tolist() for line in dots]
        assert places == [[[0, 0], [sign * 2, 5]], [[sign * 1, 10], [sign * 3, 7]]]
        assert [line.get_xydata().tolist() for line in discs] == [[[sign * 1, 2.5]], [[sign * 2, 8.5]]]
        colours = [[x.get_color() for x in group] for group in (dots, discs, handles)]
        assert colours[0] == colours[1] == colours[2] and len(set(colours[0])) == 2
    assert [t.get_text() for t in legend.get_legend().get_texts()] == ["a", "b"] and not empty.lines
    correlate.save_figure(figure, tmp_path / "s.png")
    assert len(Image.open(tmp_path / "s.png").convert("RGB").getcolors(10 ** 6)) > 20
    colours = correlate.kind_colours(["control", "send", *"abcdefghijklmn"])
    assert len(set(colours.values())) == 16 and colours["control"] == "black"


def report_folder(path, i, network="net@96", **changes):
    """A folder with the report.json of two arms."""
    arms = {arm: dict(psnr=20.0 + i, fd=100.0 - i - j, fd_n=5, probe_f1=0.5 + 0.1 * i * j, seconds={})
            for j, arm in enumerate(("control", "send"))}
    arms["send"].update(changes)
    path.mkdir()
    (path / "report.json").write_text(json.dumps({"network": network, "arms": arms}))
    return path


def arm_folder(path):
    """An arm of run.sh imagenet with two SiTs."""
    for i, model in enumerate(("SiT-B-1", "SiT-XL-1")):
        (path / model).mkdir(parents=True)
        score = dict(fd={"a": 5.0 + i}, n={"a": 50000}, network="inception")
        (path / model / "samples.npz.json").write_text(json.dumps(score))
    (path / "recon.json").write_text('{"psnr": 28.0}')
    results = {"a/vae.pt": dict(f1=0.6, seconds=3.0, per_attribute={}), "majority": dict(f1=0.1)}
    (path / "probe.json").write_text(json.dumps({"results": results}))
    return path


def test_correlate_reads_runs(tmp_path):
    """A run's rows are of other arms, SiTs or scores."""
    runs = [report_folder(tmp_path / f"run{i}", i) for i in range(3)]
    rows = [r for run in runs for r in correlate.read_run(run)]
    found = [(r["fd"], r["probe_f1"], r["run"]) for r in rows[2:4]]
    assert found == [(99.0, 0.5, str(runs[1])), (98.0, 0.6, str(runs[1]))]
    assert correlate.read_run(runs[0] / "report.json") == rows[:2]
    arm = arm_folder(tmp_path / "arm")
    found = [(r["fd"], r["psnr"], r["probe_f1"]) for r in correlate.read_run(arm)]
    assert found == [(5.0, 28.0, 0.6), (6.0, 28.0, 0.6)]
    assert [r["fd"] for r in correlate.read_run(arm / "SiT-XL-1")] == [6.0]


def test_correlate_command(tmp_path):
    """The command claims what the paper's four rows cannot show, or what three runs cannot."""
    out = do("correlate", "--paper", "--png", tmp_path / "s.png", "--json", tmp_path / "s.json")
    result = json.loads((tmp_path / "s.json").read_text())["correlations"]
    assert result["psnr"]["pearson"] == pytest.approx(0.99, abs=0.015)
    assert "not told apart" in out and out.count("undecided") == 3
    assert Image.open(tmp_path / "s.png").width > 800
    runs = [report_folder(tmp_path / f"run{i}", i) for i in range(3)]
    out = do("correlate", *runs)
    assert "n = 6" in out and "undecided: 2 kinds of VAE" in out
    less = report_folder(tmp_path / "less", 1, probe_f1=None)
    assert "left out, not in every row: probe_f1" in do("correlate", runs[0], less)


def test_bad_correlate_commands(tmp_path):
    """Rows without a distance, of several kinds of distance, too few or twice are compared, or end in a
    traceback."""
    runs = [report_folder(tmp_path / f"run{i}", i) for i in range(3)]
    other, arm = report_folder(tmp_path / "other", 3, "inception"), arm_folder(tmp_path / "arm")
    (tmp_path / "bad.json").write_text('[{"name": "a", "fd": 1}]')
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "nan.json").write_text('[{"name": "a", "fd": NaN, "psnr": 1}]')
    for words, found in (
            ((tmp_path / "bad.json",), ["a has no psnr"]), ((tmp_path / "nan.json",), ["a has no fd"]),
            ((tmp_path / "text.json",), ["text.json"]), ((tmp_path / "none",), ["none"]), ((), ["--paper"]),
            (("--paper", runs[0]), ["--paper"]), ((*runs, "--json", tmp_path), [str(tmp_path)]),
            ((*runs, other), ["do not mix", "inception", "net@96"]), ((arm,), ["do not mix", "SiT-XL-1"]),
            ((runs[0],), ["2 rows"]), ((runs[0], *runs), ["twice"]), ((tmp_path,), ["report.json"])):
        assert_refused(call("correlate", *words), *found)


# ------------------------------------------------------------------------------------------------------------
# extras/datasets.py


def attribute_folders(root):
    """Tiny copies of CelebA, DeepFashion (coarse, fine) and AwA2 as they are distributed."""
    celeba, fashion, awa = root / "celeba", root / "deepfashion", root / "awa2"
    write_images(celeba / "img_align_celeba", 12, size=40, classes=("",))
    files = data.find_images(celeba / "img_align_celeba")
    lines = [f"{f}  {1 if i % 2 else -1} {1 if i % 3 else -1}\n" for i, f in enumerate(files)]
    (celeba / "list_attr_celeba.txt").write_text(f"{len(files)}\nSmiling Young \n" + "".join(lines))
    lines = [f"{f} {i // 4 % 3}\n" for i, f in enumerate(files)]
    (celeba / "list_eval_partition.txt").write_text("".join(lines))

    write_images(fashion / "Img/img", 18, size=40, classes=("Tee", "Sheer_Blouse"))
    files = [f"img/{f}" for f in data.find_images(fashion / "Img/img")]
    for name, words in dict(Anno_coarse=["a-line", "abstract chevron print", "lace"],
                            Anno_fine=["floral", "cotton"]).items():
        (fashion / name).mkdir()
        lines = [f"{a}   {i}\n" for i, a in enumerate(words)]
        text = f"{len(words)}\nattribute_name  attribute_type\n" + "".join(lines)
        (fashion / name / "list_attr_cloth.txt").write_text(text)
    lines = [f"{f}   {1 if i % 2 else -1} {0 if i % 5 else 1} -1\n" for i, f in enumerate(files)]
    text = f"{len(files)}\nimage_name  attribute_labels\n" + "".join(lines)
    (fashion / "Anno_coarse/list_attr_img.txt").write_text(text)
    lines = [f"{f}  {data.SPLITS[i % 3]}\n" for i, f in enumerate(files)]
    (fashion / "Eval").mkdir()
    text = f"{len(files)}\nimage_name  evaluation_status\n" + "".join(lines)
    (fashion / "Eval/list_eval_partition.txt").write_text(text)
    for k, split in enumerate(data.SPLITS):
        (fashion / f"Anno_fine/{split}.txt").write_text("".join(f"{f}\n" for f in files[k::3]))
        lines = [f"{i % 2} {int(i > 2)} \n" for i in range(len(files[k::3]))]
        (fashion / f"Anno_fine/{split}_attr.txt").write_text("".join(lines))

    write_images(awa / "JPEGImages", 36, size=40, classes=("antelope", "grizzly+bear", "rat"))
    (awa / "classes.txt").write_text("     1\tantelope\n     2\tgrizzly+bear\n     3\trat\n")
    (awa / "predicates.txt").write_text("    1\tblack\n    2\tbig\n")
    (awa / "predicate-matrix-binary.txt").write_text("0 1\n1 1\n1 0\n")
    (awa / "trainclasses.txt").write_text("antelope\nrat\n")
    (awa / "testclasses.txt").write_text("grizzly+bear\n")
    return celeba, fashion / "Anno_coarse", fashion / "Anno_fine", awa


def converted(name, folder, out):
    """The table that extras/datasets.py makes, as the stages read it."""
    printed = do("datasets", name, folder, out)
    table = data.read_attributes(out)
    assert f"{len(table.files)} images" in printed and sorted(table.files) == data.find_images(out)
    return table


def test_attribute_tables_of_others(tmp_path):
    """CelebA's, DeepFashion's or AwA2's files become other images, splits, names or values."""
    celeba, coarse, fine, awa = attribute_folders(tmp_path)
    table = converted("celeba", celeba, tmp_path / "a")
    assert table.names == ["Smiling", "Young"] and table.splits == ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    assert table.values[:4].tolist() == [[0, 0], [1, 1], [0, 1], [1, 0]]
    image, original = (folder / table.files[5] for folder in (tmp_path / "a", celeba / "img_align_celeba"))
    assert image.is_symlink() and image.samefile(original)
    table = converted("deepfashion", coarse, tmp_path / "b")
    assert table.names == ["a-line", "abstract chevron print", "lace"]
    assert table.splits[:4] == ["train", "val", "test", "train"] and np.isnan(table.values[1, 1])
    assert table.values[:3, 0].tolist() == [0, 1, 0]
    assert data.ImageFolder(tmp_path / "b", 32).classes == ["Sheer_Blouse", "Tee"]
    table = converted("deepfashion", fine, tmp_path / "c")
    assert table.names == ["floral", "cotton"] and table.splits == ["train"] * 6 + ["val"] * 6 + ["test"] * 6
    assert table.values[3].tolist() == [1, 1]
    table = converted("awa2", awa, tmp_path / "d")
    by_class = {c: {s for f, s in zip(table.files, table.splits, strict=True) if f.startswith(c)}
                for c in ("grizzly", "rat")}
    assert by_class == {"grizzly": {"test"}, "rat": {"train", "val"}} and table.splits.count("val") == 2
    antelopes = table.values[[f.startswith("antelope") for f in table.files]]
    assert len(antelopes) == 12 and (antelopes == [0, 1]).all()


def test_celeba_as_png_and_from_kaggle(tmp_path):
    """CelebA's PNGs, which its tables call .jpg, or Kaggle's .csv tables and doubled folder are not found."""
    celeba, *_ = attribute_folders(tmp_path)
    expected = converted("celeba", celeba, tmp_path / "a")
    folder = celeba / "Img/img_align_celeba_png"
    folder.mkdir(parents=True)
    (celeba / "img_align_celeba").rename(folder / folder.name)
    for name, header in dict(list_attr_celeba="Smiling,Young", list_eval_partition="partition").items():
        text = (celeba / f"{name}.txt").read_text().replace(".png", ".jpg")
        rows = [",".join(line.split()) for line in text.splitlines()[-12:]]
        (celeba / f"{name}.csv").write_text("\n".join([f"image_id,{header}", *rows]))
        (celeba / f"{name}.txt").unlink()
    assert repr(converted("celeba", celeba, tmp_path / "b")) == repr(expected)


def test_folders_of_celeba_and_of_file_systems_without_links(tmp_path, monkeypatch):
    """CelebA's own folders are not found, images are not copied where links fail, or a second run spoils the
    first."""
    celeba, coarse, _, _ = attribute_folders(tmp_path)
    places = dict(Anno="list_attr_celeba.txt", Eval="list_eval_partition.txt", Img="img_align_celeba")
    for folder, name in places.items():
        (celeba / folder).mkdir()
        (celeba / name).rename(celeba / folder / name)

    def refuse(self, target):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    table = converted("celeba", celeba, tmp_path / "a")
    assert len(table.files) == 12 and not (tmp_path / "a" / table.files[0]).is_symlink()
    assert_refused(call("datasets", "celeba", celeba, tmp_path / "a"), "attributes.csv already")
    assert_refused(call("datasets", "celeba", celeba), "DIR and OUT")
    assert_refused(call("datasets", "deepfashion", coarse.parent, tmp_path / "b"), "Anno_coarse or")
    shutil.rmtree(celeba / "Img/img_align_celeba")
    assert_refused(call("datasets", "celeba", celeba, tmp_path / "b"), "img_align_celeba", "unpacked")


@pytest.mark.parametrize("file,old,new,words", [
    ("celeba/list_attr_celeba.txt", "12\n", "13\n", ["13", "12 rows"]),
    ("celeba/list_attr_celeba.txt", "000.png  -1 -1", "000.png  -1", ["000.png", "1 labels", "2"]),
    ("celeba/list_attr_celeba.txt", "000.png  -1 -1", "000.png  -1 7", ["'7'"]),
    ("celeba/list_attr_celeba.txt", "001.png  1", "999.png  1", ["999.png"]),
    ("celeba/list_eval_partition.txt", "003.png 0", "003.png 5", ["003.png", "split 5"]),
    ("celeba/list_eval_partition.txt", "003.png 0\n", "", ["11 lines", "12"]),
    ("celeba/list_eval_partition.txt", "005.png 1", "003.png 1", ["003.png", "two splits"]),
    ("celeba/list_eval_partition.txt", "005.png 1", "005.png", ["005.png", "split missing"]),
    ("celeba/list_eval_partition.txt", "", None, ["list_eval_partition.txt", "No such file", "--help"]),
    ("deepfashion/Anno_coarse/list_attr_cloth.txt", "3\nattr", "4\nattr", ["list_attr_cloth", "4"]),
    ("deepfashion/Eval/list_eval_partition.txt", "train\n", "dev\n", ["the split dev"]),
    ("deepfashion/Anno_fine/train_attr.txt", "0 0", "0 2", ["train_attr"]),
    ("deepfashion/Anno_fine/val.txt", "img/Sheer_Blouse/003.png", "img/Sheer_Blouse/001.png", ["2 times"]),
    ("deepfashion/Anno_fine/test_attr.txt", "0 0", "0", ["test_attr", "1 labels"]),
    ("deepfashion/Anno_fine/test.txt", "img/Sheer_Blouse/005.png", "img/none.png", ["none.png", "no image"]),
    ("awa2/classes.txt", "     3\trat\n", "", ["3 lines", "2"]),
    ("awa2/predicates.txt", "    2\tbig\n", "", ["2 labels", "expected 1"]),
    ("awa2/trainclasses.txt", "rat\n", "dog\n", ["dog", "classes.txt"]),
    ("awa2/testclasses.txt", "grizzly+bear\n", "rat\n", ["rat", "two splits"])])
def test_bad_tables_of_others(file, old, new, words, tmp_path):
    """A cut, inconsistent or overlapping table is used, or ends in a traceback."""
    celeba, coarse, fine, awa = attribute_folders(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new or "", 1))
    if new is None:
        (tmp_path / file).unlink()
    name, tables = file.split("/")[0], fine if "fine" in file else coarse
    folder = dict(celeba=celeba, deepfashion=tables, awa2=awa)[name]
    assert_refused(call("datasets", name, folder, tmp_path / "out"), *words)
    assert not (tmp_path / "out/attributes.csv").exists()


def idx_files(folder, n=12, last=9):
    """Fashion-MNIST's four files with n and n / 2 images of random pixels -> (images, labels) of the first
    file."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("t10k", n // 2), ("train", n)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % (last + 1)).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return images, labels


def test_fashion_mnist(tmp_path, monkeypatch):
    """Pixels, classes or splits of Fashion-MNIST are others than in its files; damaged files end in a
    traceback."""
    pixels, labels = idx_files(tmp_path / "idx")
    table = converted("fashion", tmp_path / "idx", tmp_path / "out")
    assert table.names == [*datasets.GARMENTS] and table.splits == ["train"] * 10 + ["val"] * 2 + ["test"] * 6
    for i in (0, 11):
        assert table.values[i].tolist() == np.eye(10)[labels[i]].tolist()
        assert table.files[i].startswith(f"{datasets.GARMENTS[labels[i]]}/")
        image = data.read_image(tmp_path / "out" / table.files[i], 32)
        assert (image == image[0]).all() and np.array_equal(image[0, 2:30, 2:30], pixels[i])
        assert (image[0] > 0).sum() == (pixels[i] > 0).sum()
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "idx")
    out = do("datasets", "fashion", tmp_path / "again")
    assert "18 images (10 train, 2 val, 6 test), 10 attributes" in out
    truncate(tmp_path / "idx/train-images-idx3-ubyte.gz")
    assert_refused(call("datasets", "fashion", tmp_path / "a"), "train-images", "no gzipped idx file")
    idx_files(tmp_path / "more", last=10)
    assert_refused(call("datasets", "fashion", tmp_path / "more", tmp_path / "b"), "up to 10", "up to 9")


def test_probe_names_the_command_for_data_sets_of_others(tmp_path):
    """probe.py ends in a traceback, or does not say what to do, for a data set as its owners distribute
    it."""
    state = tiny_vae().state_dict()
    common.save_checkpoint(tmp_path / "vae.pt", dict(config=tiny_vae().config, vae=state, ema=state))
    for folder in attribute_folders(tmp_path / "others"):
        assert_refused(call("probe", tmp_path / "vae.pt", "--data", folder), "python extras/datasets.py")


def posterior_features(pair, images, order):
    encode = functools.partial(probe.posterior_mean, vae.load_vae(pair / "vae.pt"), "fp32")
    return probe.collect(images, order, encode, "vae")


def test_probe_converges():
    """The solver stops away from the minimum: another strength, start or direction than scikit-learn's."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 60)) @ rng.normal(size=(60, 60)) * rng.uniform(0.01, 30, 60)  # correlated
    signal = X @ (rng.normal(size=(60, 4)) / X.std(0)[:, None]) + 3 * rng.normal(size=(600, 4))
    Y = torch.from_numpy((signal > [0, 4, -4, 12]).astype(np.float32))
    X = torch.from_numpy(X + 20 * X.std(0)).float()  # far from 0
    fitted = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:], steps=40)
    Z = ((X - X[:400].mean(0)) / X[:400].std(0)).numpy()
    for a in range(4):
        train = torch.where(torch.arange(600) < 400, Y[:, a], torch.nan)
        peers = {s: sklearn_probe(Z, train, s).decision_function(Z) for s in probe.STRENGTHS}
        losses = {s: F.binary_cross_entropy_with_logits(torch.from_numpy(z[400:]), Y[400:, a].double()).item()
                  for s, z in peers.items()}
        chosen = min(losses, key=losses.get)
        assert fitted.strength[a].item() == pytest.approx(chosen), losses
        atol = 0.01 * np.abs(peers[chosen]).max()
        np.testing.assert_allclose(fitted(X)[:, a].numpy(), peers[chosen], atol=atol)


def test_probe_in_pieces_and_blocks(monkeypatch, tmp_path):
    """Features in pieces, in blocks of columns or in a float16 file give another probe than in memory."""
    X, Y = planted(500)
    Y[::7, 1] = np.nan
    whole = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:], tolerance=1e-6)
    stored = torch.from_numpy(np.memmap(tmp_path / "x", np.float16, "w+", shape=tuple(X.shape)))
    stored.copy_(X)
    cases = (X, 30, 2048, 1e-4), (X, 10 ** 6, 5, 1e-3), (stored, 30, 3, 1e-2)
    for features, piece, block, tolerance in cases:
        monkeypatch.setattr(probe, "PIECE", piece * X.shape[1])
        monkeypatch.setattr(probe, "BLOCK", block)
        fitted = probe.fit_probe(features[:400], Y[:400], features[400:], Y[400:], tolerance=1e-6)
        assert torch.equal(fitted.strength, whole.strength)
        expected = whole(X[400:])
        atol = tolerance * expected.abs().max().item()
        torch.testing.assert_close(fitted(features[400:]), expected, rtol=0, atol=atol)


def test_constant_columns_change_nothing():
    """A column that is constant, or constant but for rounding, spoils the fit of the others."""
    X, Y = planted(500)
    expected = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:])(X)
    noise = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    for value in (0.0, 1.0, 100.0):
        padded = torch.cat([X, value * (1 + 1e-7 * noise)], 1)
        fitted = probe.fit_probe(padded[:400], Y[:400], padded[400:], Y[400:])
        torch.testing.assert_close(fitted(padded), expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_principal_axes(monkeypatch):
    """Mean, std or axes are not those of the columns, or blocks mix."""
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0))).Q
    X = planted(300)[0] @ turn
    for block, blocks in ((2048, 1), (5, 2), (4, 5)):  # the largest divisor of 10 up to 4 is 2
        monkeypatch.setattr(probe, "BLOCK", block)
        mean, std, power, axes = probe.principal_axes(X, "cpu")
        assert axes.shape == (blocks, 10 // blocks, 10 // blocks)
        torch.testing.assert_close(mean, X.mean(0))
        torch.testing.assert_close(std, X.std(0))
        turned = ((X - mean) / std).view(300, blocks, -1).transpose(0, 1) @ axes
        torch.testing.assert_close(turned.square().mean(1).flatten(), power.flatten(), rtol=1e-3, atol=1e-4)


def test_average_precision_of_equal_logits():
    """Equal logits are ranked by their place in the file."""
    Y, logits = torch.tensor([[1.0], [1], [0], [0], [0], [1]]), torch.tensor([[2.0], [1], [1], [1], [0], [0]])
    expected = sklearn.metrics.average_precision_score(Y[:, 0], logits[:, 0])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        assert probe.average_precision(Y[order], logits[order])[0] == pytest.approx(expected)
    assert probe.average_precision(torch.full((3, 1), torch.nan), torch.ones(3, 1)).item() == 0


def test_top_recall_by_hand():
    """Top-k recall counts other attributes than those of the image among its k highest."""
    Y = torch.tensor([[1, 1, 0, 0], [0, 1, 1, np.nan], [0, 0, 0, 0]])
    logits = torch.tensor([[3.0, 2, -1, -2], [1.0, 5, -9, 4], [1, 2, 3, 4]])
    assert probe.top_recall(Y, logits, 2) == pytest.approx((2 + 1) / 4)
    assert probe.top_recall(Y, logits, 5) == 1


def test_bootstrap_of_f1():
    """Resampled F1 is not that of the resampled rows, or two probes see other rows."""
    torch.manual_seed(0)
    Y = (torch.rand(200, 3) < 0.4).float()
    Y[::9, 1] = np.nan
    predicted = (Y.nan_to_num() + 0.6 * torch.randn(200, 3)) > 0.5
    both = {"a": predicted, "b": predicted.clone(), "c": torch.ones_like(predicted)}
    draws = probe.bootstrap_f1(Y, both, draws=50)
    weights = np.random.Generator(np.random.Philox(key=0)).multinomial(200, np.full(200, 1 / 200), 50)
    resampled = [np.repeat(np.arange(200), w) for w in weights]
    again = [probe.f1(Y[rows], predicted[rows]).mean().item() for rows in resampled]
    shift = probe.f1(Y, predicted).mean().item() - np.mean(again)
    assert draws["a"].tolist() == pytest.approx(np.add(again, shift), abs=1e-5)
    assert torch.equal(draws["a"], draws["b"])
    assert probe.interval(np.arange(1001)) == pytest.approx((25, 975))
    low, high = probe.interval(draws["a"])
    assert low < probe.f1(Y, predicted).mean() < high and probe.interval(draws["a"] - draws["c"])[0] > 0


def test_features_beyond_memory_lie_in_a_file(vae_pair, monkeypatch, tmp_path):
    """Large features are held in memory, a row lands in another place, unreadable images leave a hole, or a
    full disk is met late."""
    shutil.copytree(vae_pair / "images", tmp_path / "images")
    images, order = data.ImageFolder(tmp_path / "images", 32), list(reversed(range(40)))
    whole, rows = posterior_features(vae_pair, images, order)
    assert whole.dtype == torch.float32 and whole.shape == (40, math.prod(tiny_vae().latent_shape(32)))
    assert rows == order
    one = vae.load_vae(vae_pair / "vae.pt").encode(data.to_float(images[37][0][None])).mean.flatten()
    torch.testing.assert_close(whole[2], one, rtol=1e-4, atol=1e-4)
    truncate(tmp_path / "images" / images.files[35])
    images.max_bad = 0.1
    monkeypatch.setattr(probe, "IN_MEMORY", 100)
    stored, rows = posterior_features(vae_pair, images, order)
    assert stored.dtype == torch.float16 and rows == [i for i in order if i != 35]
    torch.testing.assert_close(stored.float(), whole[[i for i in range(40) if i != 4]], rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(common.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="TMPDIR"):
        posterior_features(vae_pair, images, order)
    monkeypatch.setattr(probe, "IN_MEMORY", 10 ** 6)
    with pytest.raises(UserError, match="not finite"):
        probe.collect(images, [3], lambda pixels: torch.full((len(pixels), 2), torch.inf), "x")


def test_tokens_and_pixels_by_hand(vae_pair):
    """The ceiling and the pixel baseline are of other tokens and pixels, or not of the latent's size."""
    images, vfm = data.ImageFolder(vae_pair / "images", 32), mapper.VFM("tf_efficientnet_lite0", 32, 4, LITE0)
    pixels = torch.stack([images[i][0] for i in (5, 1)])
    X = probe.averaged_tokens(vfm, 2, "cpu", pixels)
    tokens = vfm(data.to_float(pixels[1:]))[0].view(4, 4, 112)
    torch.testing.assert_close(X[1].view(112, 4)[:, 3], tokens[2:, 2:].mean((0, 1)), rtol=1e-4, atol=1e-4)
    X = probe.thumbnails(8, pixels)
    expected = data.to_float(pixels)[0, :, :4, 4:8].mean((1, 2))
    torch.testing.assert_close(X[0].view(3, 8, 8)[:, 0, 1], expected)
    args = SimpleNamespace(vae=["a"], precision="fp32", vfm=vfm.name, vfm_ckpt=LITE0, vfm_layer=None, grid=4)
    sets = probe.feature_sets(args, {"a": tiny_vae(z_channels=16)}, 32, "cpu")  # 16 x 8 x 8 = 1,024 numbers
    assert [*sets] == ["a", "tf_efficientnet_lite0 3 x 3", "pixels 18 x 18"]
    assert [f(pixels).shape[1] for f in sets.values()] == [1024, 112 * 9, 3 * 18 * 18]


def test_mixture_of_gaussians():
    """The likelihood has another scale, is worse than that of one Gaussian, or latents without spread end the
    run."""
    rng = np.random.default_rng(0)
    centres, scale = rng.normal(size=(4, 3)) * 4, np.diag([1, 0.5, 0.2])
    train, test = (torch.from_numpy(centres[rng.integers(4, size=n)] + rng.normal(size=(n, 3)) @ scale)
                   for n in (2000, 1000))
    one = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0))
    single = probe.gmm_nll(train, test, components=1)
    assert single == pytest.approx(-one.log_prob(test).mean().item() / 3, abs=1e-4)
    assert probe.gmm_nll(train, test, components=4) < single - 0.5
    gauss = torch.from_numpy(5 * rng.normal(size=(4000, 3)))
    expected = 0.5 * math.log(2 * math.pi * math.e)
    assert probe.gmm_nll(*probe.whiten(gauss[:2000], gauss[2000:]), 1) == pytest.approx(expected, abs=0.03)
    assert probe.gmm_nll(train[:11], test) is None
    assert np.isfinite(probe.gmm_nll(torch.ones(200, 3), torch.ones(5, 3)))
    assert probe.gmm_nll(*probe.whiten(torch.ones(200, 3), torch.ones(5, 3))) is None
    torch.testing.assert_close(torch.cov(probe.whiten(train, test)[0].T), torch.eye(3, dtype=torch.float64))
    repeated = (torch.cat([x, x[:, :1]], 1) for x in (train, test))  # of rank three
    assert probe.whiten(*repeated)[1].shape == (1000, 3)


def test_a_part_is_taken_evenly():
    """A part of a sorted table is its beginning, or a row comes twice."""
    assert probe.evenly(slice(10, 15), 9).tolist() == [10, 11, 12, 13, 14]
    assert probe.evenly(slice(0, 1001), 3).tolist() == [0, 500, 1000]
    rows = probe.evenly(slice(7, 160_007), 5000)
    assert len(set(rows.tolist())) == 5000 and rows[0] == 7 and rows[-1] == 160_006


def test_rivals_know_no_scale(vae_pair):
    """A rival depends on the latents' scale or shift, or the class probe runs where the splits' classes
    differ."""
    images, model = data.ImageFolder(vae_pair / "images", 32), vae.load_vae(vae_pair / "vae.pt")
    torch.manual_seed(0)
    X, rows = posterior_features(vae_pair, images, torch.randperm(40).tolist())
    labels, pixels = torch.tensor(images.labels)[rows], torch.stack([images[i][0] for i in rows[:20]])
    part = {"train": slice(0, 20), "val": slice(20, 30), "test": slice(30, 40)}
    found, moved = (probe.rivals(model, x, labels, part, pixels, "cpu") for x in (X, 100 * X + 7))
    for name in ("kde_gini", "gmm_nll", "lnc", "lds", "sec"):
        if name in found or name != "gmm_nll":
            assert found[name] == pytest.approx(moved[name], rel=1e-3)
    decoded = data.to_uint8(model.decode(model.encode(data.to_float(pixels)).mean))
    assert found["psnr"] == pytest.approx(fid.psnr(pixels, decoded).mean().item(), abs=1e-3)
    X = torch.cat([X[:, :3], 5 * labels[:, None] + torch.randn(40, 1)], 1)
    assert probe.class_accuracy(X, labels, part, "cpu") >= 0.9
    assert probe.class_accuracy(X, torch.zeros(40, dtype=torch.long), part, "cpu") is None
    assert probe.class_accuracy(X, torch.where(torch.arange(40) < 30, labels, 2), part, "cpu") is None


class Transparent(nn.Module):
    """A VAE whose pictures are its latents, times a gain."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def decode(self, z):
        return self.gain * z

    def encode(self, x):
        return SimpleNamespace(mean=x)


def test_directions():
    """A step does not raise its attribute's logit as asked, or reached and leak are not those of a VAE that
    shows all or nothing."""
    torch.manual_seed(0)
    z, zeros = 0.1 * torch.randn(50, 3, 4, 4), torch.zeros(3)
    pixels = data.to_uint8(z)
    square = probe.Probe(torch.linalg.qr(torch.randn(48, 3)).Q, zeros, zeros, torch.zeros(48))
    moved = data.to_float(probe.decode_moved(Transparent(), square, z, 1, 0.3)).flatten(1)
    change = square(moved) - square(z.flatten(1))
    torch.testing.assert_close(change.mean(0), torch.tensor([0, 0.3, 0]), rtol=0, atol=3e-3)
    reached, leak, _ = probe.directions(Transparent(), square, pixels, square(z.flatten(1)).std(0))
    assert reached.tolist() == pytest.approx([1, 1, 1], abs=0.02) and leak.max() < 0.02  # orthogonal
    weight = square.weight @ torch.tensor([[1.0, 0.6, 0], [0, 0.8, 0], [0, 0, 1]])
    mixed = probe.Probe(weight, zeros, zeros, torch.zeros(48))
    spread = mixed(z.flatten(1)).std(0)
    reached, leak, _ = probe.directions(Transparent(), mixed, pixels, spread)
    assert leak[0] == pytest.approx(0.6 * (spread[0] / spread[1]).item() / 2, abs=0.02) and leak[2] < 0.02
    half, same, _ = probe.directions(Transparent(0.5), mixed, pixels, spread)
    assert half.tolist() == pytest.approx([0.5] * 3, abs=0.02)
    assert same.tolist() == pytest.approx(leak.tolist(), abs=0.02)
    assert probe.directions(Transparent(0.0), mixed, pixels, spread)[0].tolist() == [0, 0, 0]
    nothing = probe.Probe(torch.zeros(48, 3), zeros, zeros, torch.zeros(48))  # a step of no direction
    assert probe.directions(Transparent(), nothing, pixels, spread)[0].tolist() == [0, 0, 0]


def test_what_the_probe_saw_is_drawn(vae_pair, tmp_path):
    """Pictures lie in another order than down, as it is, up; or under another VAE or attribute."""
    images, model = data.ImageFolder(vae_pair / "images", 32), vae.load_vae(vae_pair / "vae.pt")
    pixels = torch.stack([images[i][0] for i in range(5)])
    z = model.encode(data.to_float(pixels)).mean[:4]
    torch.manual_seed(0)
    zeros = torch.zeros(3)
    fitted = probe.Probe(torch.randn(z[0].numel(), 3), zeros, zeros, torch.zeros(z[0].numel()))
    _, _, pictures = probe.directions(model, fitted, pixels, torch.tensor([1.0, 2, 3]), [2, 0])
    assert len(pictures) == 2 and pictures[0].shape == (4, 3, 3, 32, 32)
    w = fitted.weight[:, 2]
    up = data.to_uint8(model.decode(z + (probe.REACH * 3 * w / (w @ w)).view(z.shape[1:])))
    assert torch.equal(pictures[1][:, 1], data.to_uint8(model.decode(z)))
    assert (pictures[0][:, 2].int() - up.int()).abs().max() <= 1
    assert not torch.equal(pictures[0][:, 0], pictures[0][:, 2])
    negatives, titles = [255 - p for p in pictures], ["x", "y"]
    probe.draw_directions(tmp_path / "s.png", {"a": (titles, pictures), "b": (titles, negatives)})
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (2 * (18 + 2 * 70), 150 + 4 * 198, 3)  # 32 pixels are shown as 64
    for top, left, picture in ((18, 150 + 128, pictures[0][0, 2]), (18 + 70, 150 + 198, pictures[1][1, 0]),
                               (158 + 18, 150, 255 - pictures[0][0, 0])):
        shown = sheet[top:top + 64, left:left + 64]
        assert np.array_equal(shown[::2, ::2], picture.permute(1, 2, 0).numpy())
        assert np.array_equal(shown[::2, ::2], shown[1::2, 1::2])


def test_probe_with_everything(vae_pair, tmp_path):
    """The table, rivals, pictures, interval, differences or scores of attributes lack something."""
    root, _, _ = labelled(vae_pair, tmp_path / "images")
    first, second = vae_pair / "vae.pt", vae_pair / "other.pt"
    out = do("probe", first, second, "--data", root, "--rivals", "--png", tmp_path / "a.png", "--show", "b",
             "--json", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    scores = record["results"][str(first)]
    assert "top5_recall" not in scores  # of two attributes it is always 1
    assert {"f1", "class_accuracy", "kde_gini", "lnc", "lds", "sec", "shift_error", "scale_error",
            "psnr", "f1_interval", "reached", "leak"} <= scores.keys()
    assert "not defined here: viv" in out  # of 20 images
    assert "minus" in out and ("within chance" in out or "beyond" in out)
    assert Image.open(tmp_path / "a.png").size == (150 + 4 * 198, 2 * (18 + 70))
    assert record["attributes"] == ["a", "b"] and len(scores["per_attribute"]["f1"]) == 2
    table = data.read_attributes(root)
    tested = table.values[np.array(table.splits) == "test"][:, [table.names.index(k) for k in ("a", "b")]]
    assert record["share"] == pytest.approx(np.nanmean(tested, 0).tolist())
    out = do("probe", first, second, "--data", root, "--resolution", 96, "--dry-run")
    assert "2 attributes, 40 images of 96 x 96" in out and "the median short side is 64" in out


@pytest.mark.parametrize("flags,words", [
    (("--png", "a.png", "--show", "Hat"), ["--show Hat", "a, b"]),
    (("--png", "a.png", "--show", "constant"), ["--show constant", "a, b"]),
    (("--show", "a"), ["--show", "without --png"]),
    (("--grid", 4), ["--grid", "without --vfm"]),
    (("--vfm-layer", 4), ["--vfm-layer", "without --vfm"]),
    (("--json", "."), ["is a folder"]),
    (("--resolution", 36, "--rivals"), ["--resolution 36", "multiple of 8", "--rivals"]),
    (("--vfm", "no_such_model"), ["no_such_model"])])
def test_bad_probe_commands(flags, words, vae_pair, tmp_path, monkeypatch):
    """A mistake in a command of probe.py is met late, or ends in a traceback."""
    root, _, _ = labelled(vae_pair, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    assert_refused(call("probe", vae_pair / "vae.pt", "--data", root, *flags), *words)


def test_bad_probe_inputs(vae_pair, tmp_path, monkeypatch):
    """A VAE given twice, a table without a usable attribute, a missing package, data as others distribute it,
    or the command that moved end in a traceback."""
    root, _, _ = labelled(vae_pair, tmp_path / "images")
    first = vae_pair / "vae.pt"
    assert_refused(call("probe", first, first, "--data", root), "twice")
    assert_refused(call("probe", first), "--data")
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    assert_refused(call("probe", first, "--data", root, "--rivals"), "pip install scikit-learn")
    text = (root / "attributes.csv").read_text()
    (root / "attributes.csv").write_text(text.replace("val", "train"))
    assert_refused(call("probe", first, "--data", root), "no image has split 'val'", "train, val, test")


def test_attributes_of_samples(tmp_path):
    """Shares of attributes, pairs or impossible ones are counted wrongly, or a class that cannot have an
    attribute counts among those that do not."""
    root, lines = tmp_path / "images", ["file,split,red,green"]
    for i in range(240):
        label, red, green = "ab"[i % 2], i // 2 % 2, i // 4 % 2
        path = root / label / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        green *= label == "a"  # b cannot be green
        Image.new("RGB", (32, 32), (255 * red, 255 * green, 255 * (label == "b"))).save(path)
        lines.append(f"{label}/{path.name},{data.SPLITS[i // 8 % 3]},{red},{green if label == 'a' else ''}")
    (root / "attributes.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    net = timm.create_model("resnet10t")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "oracle.safetensors")

    def sample(name, colours, labels):
        pixels = np.array(colours, np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
        path = tmp_path / name / "control/samples.npz"
        path.parent.mkdir(parents=True)
        write_npz(path, pixels, arr_1=np.array(labels))
        return path

    black, red, green, both, blue = (0, 0, 0), (255, 0, 0), (0, 255, 0), (255, 255, 0), (0, 0, 255)
    alike = sample("seed0", [black, red, green, both, blue, (255, 0, 255)], [0] * 4 + [1] * 2)
    other = sample("seed1", [red] * 3 + [both], [0, 0, 0, 1])  # all red; a green one was to be a b
    out = do("attributes", root, tmp_path / "oracle.safetensors", alike, other, "--json",
             tmp_path / "out.json")
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["reader_f1"] == 1 and "minus control" not in out
    real, alike, other = record["scores"].values()
    for same in (real, alike):
        assert same == pytest.approx(dict(frequencies=0, pairs=0, rare=1, impossible=0, drift=0), abs=1e-6)
    assert other["impossible"] == pytest.approx(1 / 4) and other["rare"] == 0  # b cannot have the pair
    assert list(record["changes"].values())[2] == {"red": 0.5, "green": -0.5}
    assert other["pairs"] == pytest.approx(0.25)  # of an a, which alone may be both
    runs = {f"s{s}/{arm}/x.npz": {"k": float(v)} for s, pair in enumerate(((1, 2), (3, 5), (4, 7)))
            for arm, v in zip(("control", "send"), pair)}
    found = attributes.differences(runs)["send"]["k"]
    assert found == pytest.approx((2, 2 - 4.3027 / 3 ** 0.5, 2 + 4.3027 / 3 ** 0.5), abs=1e-3)
    assert attributes.differences(dict(list(runs.items())[:4])) == {}  # of two seeds no interval
    cut = sample("cut", [black] * 3, [0, 0, 2])
    assert_refused(call("attributes", root, tmp_path / "oracle.safetensors", cut), "its label 0 to 1")
    assert_refused(call("attributes", root, tmp_path / "oracle.safetensors", cut, "--size", 16),
                   "32 pixels", "expected two or more of 16")


def test_velocity_variance_by_integral():
    """VIV is not the mean over dimensions of the velocity's variance given x_t, integrated over t, or classes
    are mixed."""
    torch.manual_seed(0)
    mix_channels, mix_positions = torch.randn(3, 3), torch.randn(4, 4) / 2
    x = torch.einsum("cd,ndp,pq->ncq", mix_channels, torch.randn(20_000, 3, 4), mix_positions)
    covariance = np.cov(x.flatten(1).double().numpy().T)
    t, dt = np.linspace(0, 1, 20_001, retstep=True)
    mean = [np.trapezoid(v / ((1 - t) ** 2 + t ** 2 * v), dx=dt) for v in np.linalg.eigvalsh(covariance)]
    labels = torch.arange(len(x)) % 2
    shifted = (x + 9 * labels[:, None, None]).view(-1, 3, 2, 2)
    assert probe.velocity_variance(shifted, labels) == pytest.approx(np.mean(mean), rel=0.01)
    few = torch.arange(60) // 6, torch.zeros(60, dtype=torch.long)
    assert probe.velocity_variance(shifted[:60], few[0]) is None  # six latents a class
    assert probe.velocity_variance(shifted[:1].repeat(60, 1, 1, 1), few[1]) is None  # without spread
    # Of another covariance than a product the likeliest one follows a change of the axes
    x = torch.cat([x, torch.randn(20_000, 3, 4) * torch.tensor([9.0, 1, 27, 3])])[::2].double()
    x[:, 0, 1:] *= 2
    a, b = torch.randn(3, 3).double(), torch.randn(4, 4).double()
    (plain, _), (turned, _) = (probe.kronecker_factors(v - v.mean(0), 50) for v in (x, a @ x @ b))
    expected = a @ plain @ a.T
    torch.testing.assert_close(turned / turned.trace(), expected / expected.trace(), rtol=1e-3, atol=1e-4)


def test_neighbours_by_hand():
    """LNC counts the latent itself or other than the k nearest; LDS other pairs than neighbours and far
    ones."""
    at = torch.tensor([0.0, 1, 2, 10, 11, 12])[:, None, None, None] + torch.tensor([[-1.0, 1], [1, -1]])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    assert probe.neighbour_consistency(at, labels, k=2) == pytest.approx((1 + 1 + 0 + 2 + 2 + 2) / 12)
    assert probe.neighbour_consistency(at, labels, k=6) is None
    assert probe.neighbour_consistency(at, torch.zeros(6), k=2) is None
    angle = torch.arange(8.0)[None] + torch.arange(8.0)[:, None]  # in eighths of a turn, by the distance
    z = torch.stack([torch.cos(angle * math.pi / 4), torch.sin(angle * math.pi / 4)])[None]
    far = [math.cos((i + j - k - m) * math.pi / 4) for i in range(8) for j in range(8) for k in range(8)
           for m in range(8) if abs(i - k) + abs(j - m) >= 6]
    assert probe.local_similarity(z) == pytest.approx(math.cos(math.pi / 4) - np.mean(far), abs=1e-5)
    assert probe.local_similarity(z[..., :2, :2]) == pytest.approx(math.cos(math.pi / 4) - 0.5, abs=1e-5)
    assert probe.local_similarity(z[..., :2, :1]) is None
