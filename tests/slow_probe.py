from helpers import *  # noqa: F403

import gzip

import correlate
import datasets

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
            (("--paper", runs[0]), ["--paper"]), ((*runs, "--json", tmp_path), ["is a folder"]),
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
