from helpers import *  # noqa: F403


def gaussian(seed, n=500, d=12):
    rng = np.random.default_rng(seed)
    return fid.statistics(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + seed)


def test_frechet_distance():
    """The distance differs from the definition with scipy's matrix square root, or from
    |mu1 - mu2|^2 + sum (sd1 - sd2)^2 of independent dimensions."""
    (m1, s1), (m2, s2) = gaussian(0), gaussian(2)
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9 * np.trace(s1))
    sd1, sd2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    found = fid.frechet_distance(np.zeros(3), np.diag(sd1 ** 2), np.full(3, 2.0), np.diag(sd2 ** 2))
    assert found == pytest.approx(4 * 3 + np.square(sd1 - sd2).sum())


def test_frechet_distance_low_rank():
    """Fewer samples than dimensions give nan, a negative or an asymmetric distance."""
    a, b = (fid.statistics(np.random.default_rng(i).normal(size=(10, 40)).astype(np.float32)) for i in (0, 1))
    ab, ba = fid.frechet_distance(*a, *b), fid.frechet_distance(*b, *a)
    assert ab > 0 and ab == pytest.approx(ba, rel=1e-6) and abs(fid.frechet_distance(*a, *a)) < 1e-5


def test_frechet_distance_errors():
    """Statistics of two networks, or broken features, give a number."""
    with pytest.raises(UserError, match="12 and 7"):
        fid.frechet_distance(*gaussian(0), *gaussian(0, d=7))
    m, s = gaussian(0)
    with pytest.raises(UserError, match="not finite"):
        fid.frechet_distance(m * np.nan, s, m, s)


def test_statistics():
    """Mean or covariance is biased, of the wrong axis, loses digits to a large mean, or weighs rows
    wrongly."""
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    for shift, block in ((0, 4096), (1000, 29)):
        shifted = x + np.float32(shift)
        mean, covariance = fid.statistics(shifted, block=block)
        exact = shifted.astype(np.float64)
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
        assert mean.dtype == covariance.dtype == np.float64
    counts = np.arange(200) % 3
    repeated = np.repeat(x.astype(float), counts, 0)
    covariance = fid.statistics(x, counts)[1]
    np.testing.assert_allclose(covariance, np.cov(repeated, rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Random weights of the Inception network whose activations keep a sane scale: (network, file)."""
    torch.manual_seed(0)
    net = fid.FIDInception(weights=False).net
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # as converted from TensorFlow
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, path)
    return fid.FIDInception(path), path


def test_inception_is_torch_fidelitys(inception):
    """Features or class probabilities differ from torch-fidelity's with the same weights: pools, resize,
    scale or the logits' bias."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    peer = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"],
                                       feature_extractor_weights_path=str(inception[1]))
    seen = []
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: seen.append(y))
    for height, width in ((64, 80), (256, 256), (299, 299), (320, 311)):
        x = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            pool, logits = peer(x)
        ours, spatial, probabilities = inception[0].features(x)
        expected = seen.pop()[:, :7].permute(0, 2, 3, 1)  # rows, columns, channels
        assert pool.std() > 0.05
        torch.testing.assert_close(ours, pool, rtol=0, atol=1e-4)
        torch.testing.assert_close(probabilities, logits.softmax(1), rtol=0, atol=1e-6)
        torch.testing.assert_close(spatial.view(1, 17, 17, 7), expected, rtol=0, atol=1e-4)


def test_inception_is_pytorch_fids(inception, monkeypatch):
    """But for the resize and the scale, the features differ from pytorch-fid's with the same weights."""
    import pytorch_fid.inception
    load = lambda *_, **__: torch.load(inception[1])
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", load)
    monkeypatch.setattr(fid, "resize_tf1", lambda x, size: F.interpolate(x, (size, size), mode="bilinear"))
    x = torch.randint(0, 256, (1, 3, 100, 256), dtype=torch.uint8)
    with torch.no_grad():
        expected = pytorch_fid.inception.InceptionV3([3]).eval()(x / 255)[0].flatten(1)
    torch.testing.assert_close(inception[0](x * (128 / 127.5)), expected, rtol=0, atol=1e-4)


def test_inception_weights_that_cannot_be_had(inception, tmp_path, monkeypatch):
    """Weights that miss, do not fit or cannot be fetched end in a traceback or in random features."""
    def fail(*_, **__):
        raise RuntimeError('invalid hash value (expected "6726825d", got "0")')

    state = torch.load(inception[1])
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("no weights")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    for ckpt, words in ((tmp_path / "part.pth", "Mixed_7c.branch_pool.conv.weight is missing"),
                        (tmp_path / "text.pth", "text.pth"), (tmp_path / "none.pth", "none.pth"),
                        (None, "6726825d.*--net-ckpt")):
        with pytest.raises(UserError, match=words):
            fid.FIDInception(ckpt)
    with pytest.raises(UserError, match="299"):
        fid.load_net("inception", inception[1], 96)


def test_inception_score_by_hand():
    """IS is another average: of splits, of the exponent, or a class without weight turns it into NaN."""
    probs = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 11).astype(np.float32)
    probs[0] = [1, 0, 0, 0, 0, 0]
    expected = []
    for part in (probs[:4].astype(float), probs[4:8].astype(float), probs[8:].astype(float)):
        mean = part.mean(0)
        divergence = [sum(p * np.log(p / m) for p, m in zip(row, mean) if p > 0) for row in part]
        expected.append(np.exp(np.mean(divergence)))
    assert fid.inception_score(probs, split=4) == pytest.approx(np.mean(expected), rel=1e-6)
    assert fid.inception_score(np.full((7, 4), 0.25)) == pytest.approx(1)
    assert fid.inception_score(np.eye(5)) == pytest.approx(5)


def test_precision_recall_by_hand(monkeypatch):
    """Precision and recall count other balls than those of the third neighbour, or blocks lose pairs."""
    rng = np.random.default_rng(0)
    ref = rng.standard_normal((31, 4)).astype(np.float32)
    sample = (rng.standard_normal((23, 4)) * 0.7 + 0.8).astype(np.float32)
    d = lambda a, b: np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).sum(-1))
    radius = lambda x: np.sort(d(x, x), 1)[:, 3]  # 0: itself
    precise = (d(sample, ref) <= radius(ref)[None]).any(1).mean()
    recalled = (d(ref, sample) <= radius(sample)[None]).any(1).mean()
    assert 0.2 < precise < 1 and 0.2 < recalled < 1 and precise != recalled
    assert fid.precision_recall(ref, sample) == pytest.approx((precise, recalled))
    blocks = fid.distance_blocks
    monkeypatch.setattr(fid, "distance_blocks", lambda a, b: blocks(a, b, block=7))
    assert fid.precision_recall(ref, sample) == pytest.approx((precise, recalled))
    assert fid.precision_recall(ref, ref) == (1, 1) and fid.precision_recall(ref, ref + 100) == (0, 0)
    for bad in (ref[:3], np.where(ref > 2, np.nan, ref)):
        with pytest.raises(UserError):
            fid.precision_recall(bad, sample)


def test_class_agreement():
    """Samples of the wrong class agree, those of the right one do not, or the classifier is scored on what it
    was fitted to."""
    rng = np.random.default_rng(0)
    labels, asked = rng.integers(0, 3, 600), rng.integers(0, 3, 300)
    centres = rng.normal(size=(3, 20)) * 3
    draw = lambda y: centres[y] + rng.normal(size=(len(y), 20))
    agreement = fid.class_agreement(draw(labels), labels, draw(asked), asked)
    assert agreement == pytest.approx((1, 1), abs=0.02)
    assert fid.class_agreement(draw(labels), labels, draw((asked + 1) % 3), asked)[0] < 0.02
    noise, more = rng.normal(size=(600, 400)), rng.normal(size=(300, 400))  # 480 rows are fitted well
    assert max(fid.class_agreement(noise, labels, more, asked)) < 0.5


def write_npz(path, images, **more):
    np.savez(path, arr_0=images, **more)
    return path


def read_scores(path):
    (scores,) = json.loads(Path(path).read_text())["scores"].values()
    return scores


def test_score_is_adms(inception, tmp_path, monkeypatch):
    """FID, sFID, IS, precision and recall of the command differ from the functions on the features, or files
    of statistics change them."""
    full, net, known = inception[0], copy.copy(inception[0]), {}

    def features(x):  # few of them, and once an image: distances and tests take a moment
        key = x.numpy().tobytes()
        if key not in known:
            known[key] = [v[:, :48] for v in full.features(x)]
        return known[key]

    net.dim, net.features = 48, features
    monkeypatch.setattr(fid, "load_net", lambda *_, **__: net)
    rng, pixels = np.random.default_rng(0), {}
    for i, name in enumerate(("ref", "one")):
        pixels[name] = rng.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8) // (1 + i)
        write_npz(tmp_path / f"{name}.npz", pixels[name])
    ref, one = (net.features(torch.from_numpy(v).permute(0, 3, 1, 2)) for v in pixels.values())
    flags = (tmp_path / "one.npz", "--json", tmp_path / "a.json")
    out = do("fid", "score", tmp_path / "ref.npz", *flags, "--save-stats", tmp_path / "stats.npz",
             "--bootstrap", 2)
    s, result = read_scores(tmp_path / "a.json"), json.loads((tmp_path / "a.json").read_text())

    def distance(a, b):
        stats = [(np.mean(f.double().numpy(), 0), np.cov(f.double().numpy(), rowvar=False)) for f in (a, b)]
        return fid.frechet_distance(*stats[0], *stats[1])

    assert s["fd"] == pytest.approx(distance(ref[0], one[0]), rel=1e-4)
    assert s["sfid"] == pytest.approx(distance(ref[1], one[1]), rel=1e-4)
    assert s["inception_score"] == pytest.approx(fid.inception_score(one[2]), rel=1e-4)
    assert (s["precision"], s["recall"]) == pytest.approx(fid.precision_recall(ref[0], one[0]))
    assert 0 < s["interval"] < s["fd"] and result["n"] == {str(tmp_path / "one.npz"): 10}
    assert f"FID-10 {s['fd']:.2f} +- {s['interval']:.2f}, sfid {s['sfid']:.4f}, inception_score" in out
    assert (result["metric"], result["network"]) == ("FID", "inception") and "TensorFlow" in result["resize"]
    assert "samples of 10 images" in out and "floor" in out and result["weights"] in out
    saved = np.load(tmp_path / "stats.npz")
    adm = {k: saved[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
    assert saved["mu_s"].shape == (48,) and saved["n"] == 10
    # as ADM's reference files: statistics of all, images of some
    write_npz(tmp_path / "adm.npz", pixels["ref"][:5], **adm)
    for reference, more, n in (("adm", True, 0), ("stats", False, 10)):
        do("fid", "score", tmp_path / f"{reference}.npz", *flags)
        again = read_scores(tmp_path / "a.json")
        assert [again[k] for k in ("fd", "sfid")] == pytest.approx([s[k] for k in ("fd", "sfid")], rel=1e-6)
        assert ("recall" in again) == more and "inception_score" in again
        assert json.loads((tmp_path / "a.json").read_text())["n_reference"] == n
    assert np.array_equal(fid.load_stats(tmp_path / "stats.npz")[1]["sigma"], saved["sigma"])
    monkeypatch.setattr(net, "label", "another")
    with pytest.raises(UserError, match="statistics of inception"):
        fid.load_stats(tmp_path / "stats.npz")
    with pytest.raises(UserError, match="--save-stats"):
        fid.load_stats(tmp_path / "adm.npz")


def test_sample_files_are_mapped(tmp_path):
    """50,000 samples are read into memory, or a file is mapped at another place than its data."""
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_1=np.arange(9), arr_0=x)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(x))
    sample.write_npz(tmp_path / "ours.npz", {"arr_0": x, "arr_1": np.arange(9)})
    for name in ("plain", "packed", "fortran", "ours"):
        array = fid.map_array(tmp_path / f"{name}.npz", "arr_0")
        assert isinstance(array, np.memmap) == (name in ("plain", "ours")) and np.array_equal(array, x)
        source = fid.load_source(tmp_path / f"{name}.npz")
        pixels, rows = source.read([0, 8])
        assert source.n == 9 and rows == [0, 8]
        assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), x[[0, 8]])


class Colours(nn.Module):
    """A network of no time: the colours of 4 x 4 parts."""
    label, dim = "colours", 48

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 32


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(fid, "load_net", lambda *_, **__: Colours())
    return ("--net", "colours")


def stats_of(d=48, **more):
    return dict(mu=np.zeros(d), sigma=np.eye(d), **more)


@pytest.mark.parametrize("make,words", [
    (lambda x: dict(images=x), ["arr_0", "mu"]),
    (lambda x: dict(arr_0=x.transpose(0, 3, 1, 2)), ["(9, 3, 8, 8)", "channels last"]),
    (lambda x: dict(arr_0=x / 127.5 - 1), ["float64", "0 to 255"]),
    (lambda x: dict(arr_0=x[:1]), ["1 images"]),
    (lambda x: dict(arr_0=x[..., :1]), ["(9, 8, 8, 1)"]),
    (lambda x: dict(arr_0=np.array([{}], object)), ["x.npz"]),
    (lambda x: stats_of(3), ["inception with mu (3,)", "48"]),
    (lambda x: dict(stats_of(network="colours"), sigma=np.zeros(3)), ["sigma (3,)"]),
    (lambda x: dict(stats_of(network="colours"), mu=np.full(48, np.nan)), ["not finite"]),
    (lambda x: stats_of(), ["statistics of inception"]),
    (lambda x: stats_of(network="colours", weights="0123"), ["weights 0123"])])
def test_bad_sample_files(make, words, judge, tmp_path):
    """A file of another layout, range, type or network is scored, or ends in a traceback."""
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    write_npz(tmp_path / "good.npz", x)
    np.savez(tmp_path / "x.npz", **make(x))
    assert_refused(call("fid", "score", tmp_path / "good.npz", tmp_path / "x.npz", *judge), *words)


def test_warnings_of_the_score(judge, tmp_path, monkeypatch):
    """JPEG samples, unequal counts and features that are not finite pass in silence."""
    ref, jpeg, png = (write_images(tmp_path / name, n, 32) for name, n in dict(ref=12, jpeg=8, png=6).items())
    for path in jpeg.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    out = do("fid", "score", ref, jpeg, png, *judge)
    assert "jpeg holds JPEG files" in out and "of 6 and 8 images" in out and "png holds" not in out
    assert "pixels a side" not in out and "enlarged" not in out
    monkeypatch.setattr(Colours, "forward", lambda _, x: torch.full((len(x), 48), torch.nan))
    assert_refused(call("fid", "score", ref, png, *judge), "ref", "not finite")


def test_no_single_file_decides_the_crop(judge, tmp_path):
    """A folder is cropped to its first image; sizes that differ, or images that are enlarged, pass in
    silence; large images are taken 64 at a time."""
    folder = write_images(tmp_path / "folder", 20)
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.rglob("*.png"))])
    Image.open(folder / "a/000.png").resize((8, 8)).save(folder / "a/000.png")
    large, small = (write_npz(tmp_path / f"{n}.npz", pixels[:, :n, :n]) for n in (64, 32))

    def sizes(reference, *samples, resolution=None):
        args = dict(reference=reference, samples=list(samples), split=None, resolution=resolution, vae=None)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            sources = fid.load_sources(SimpleNamespace(**args))
        return [s.size for s in sources], out.getvalue()

    found, out = sizes(folder, "none")
    assert found == [64] and "20 images, cropped to 64 x 64" in out
    assert "1 of 20 images" in out and "enlarged" in out
    assert sizes(folder, large)[0] == [64, 64] and sizes(large, folder)[0] == [64, 64]
    assert sizes(folder, small)[0] == [32, 32]  # the samples' own side
    assert sizes(folder, small, resolution=48)[0] == [48, 32]
    assert sizes(folder, folder, resolution=16)[0] == [16, 16]
    assert "of 32 and 64 pixels a side" in sizes(small, folder)[1]
    out = do("fid", "score", folder, large, *judge, "--json", tmp_path / "a.json")
    assert read_scores(tmp_path / "a.json")["fd"] < 1 and "cropped to 64 x 64" in out  # all but one are equal
    taken = []

    def read(rows):
        taken.append(len(rows))
        return torch.zeros(len(rows), 3, 4, 4, dtype=torch.uint8), rows

    for size in (64, 512, 1024, 3000):
        fid.measure(fid.Source("x", 65, read, size), fid.load_net(), "", torch.device("cpu"), "fp32")
    assert taken == [64, 1, 64, 1, *[16] * 4, 1, *[1] * 65]


def test_unreadable_image_is_left_out(judge, tmp_vae, tmp_path):
    """One truncated image of a reference or sample set ends the command after all the work, or counts as
    read."""
    whole = write_images(tmp_path / "whole", 128, size=16, classes=("a", "b"))
    shutil.copytree(whole, tmp_path / "cut")
    truncate(tmp_path / "cut/a/050.png")
    truncate(tmp_path / "cut/b/127.png", share=0.1)  # more than 1 % are too many
    assert_refused(call("fid", "score", tmp_path / "cut", whole, *judge), "2 of 128 images are unreadable")
    shutil.copy(whole / "b/127.png", tmp_path / "cut/b/127.png")
    pixels, labels = zip(*(data.ImageFolder(whole, 16)[i] for i in range(20, 60)))
    pixels = torch.stack(pixels).permute(0, 2, 3, 1).numpy()
    samples, found = write_npz(tmp_path / "samples.npz", 255 - pixels // 2, arr_1=np.array(labels)), {}
    for name in ("cut", "less"):
        flags = ("--vae", tmp_vae, "--cache", tmp_path / f"{name}.npz", "--json", tmp_path / "a.json", *judge)
        for _ in range(2):  # the second time from the cache
            out = do("fid", "score", tmp_path / name, samples, *flags)
            found.setdefault(name, []).append(json.loads((tmp_path / "a.json").read_text()))
        assert ("127 images, 1 unreadable" in out) == (name == "cut")
        if name == "cut":
            shutil.copytree(tmp_path / "cut", tmp_path / "less")
            (tmp_path / "less/a/050.png").unlink()
    values = []
    for r in sum(found.values(), []):
        assert r["n_reference"] == 127 and r["floor_n"] == 63
        values.append([r["floor"], *r["fd_real"].values(), *r["scores"][str(samples)].values()])
    assert values[0] == values[1] and values[2] == values[3] and len(values[0]) == 11
    assert values[0][:-4] == pytest.approx(values[2][:-4], rel=1e-3, abs=1e-3)  # the VAE's noise is a row's
    do("fid", "score", whole, tmp_path / "cut", "--json", tmp_path / "a.json", *judge)
    assert json.loads((tmp_path / "a.json").read_text())["n"] == {str(tmp_path / "cut"): 127}
    do("fid", "recon", "--vae", tmp_vae, "--data", tmp_path / "cut", "--resolution", 16, "--lpips", 0, *judge,
       "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["n"] == 127


@pytest.fixture(scope="session")
def tmp_vae(tmp_path_factory):
    """The file of a small VAE with random weights."""
    path, model = tmp_path_factory.mktemp("vae") / "vae.pt", tiny_vae(resolution=32)
    torch.save(dict(config=model.config, vae={}, ema=model.state_dict()), path)
    return path


def test_recon_scores(tmp_vae, vgg, judge, tmp_path):
    """rFD or LPIPS of the command differ from the functions on the same crops, or enlarged images go
    unsaid."""
    root = write_images(tmp_path / "images", 6, size=40)
    command = ("fid", "recon", "--vae", tmp_vae, "--data", root)
    out = do(*command, *judge, "--lpips-ckpt", vgg[1], "--json", tmp_path / "a.json")
    result, images = json.loads((tmp_path / "a.json").read_text()), data.ImageFolder(root, 32)
    pixels, model = torch.stack([images[i][0] for i in range(6)]), vae.load_vae(tmp_vae)
    with torch.no_grad():
        y = data.to_uint8(model.decode(model.encode(data.to_float(pixels)).mean))
        lpips = fid.build_lpips(vgg[1], torch.device("cpu"))(data.to_float(pixels), data.to_float(y))
    assert result["lpips"] == pytest.approx(lpips.mean().item(), rel=1e-4)
    expected = fid.frechet_distance(*fid.statistics(Colours()(pixels)), *fid.statistics(Colours()(y)))
    assert result["fd"] == pytest.approx(expected, rel=1e-3) and result["metric"] == "FD(colours)"
    assert result["psnr"] == pytest.approx(fid.psnr(pixels, y).mean().item(), rel=1e-5)
    assert f"PSNR {result['psnr']:.4f}" in out and "6 images, cropped to 32 x 32" in out
    assert "enlarged" not in out
    assert "6 of 6 images" in do(*command, "--resolution", 64, "--net", "none", "--lpips", 0)
    assert_refused(call(*command, "--resolution", 33, "--net", "none", "--lpips", 0), "33", "factor 4")
    out = do(*command, "--dry-run", "--json", tmp_path / "dry.json")
    assert "6 images" in out and not (tmp_path / "dry.json").exists()


def test_scores_against_the_reconstructions(tmp_vae, judge, tmp_path):
    """The VAE's part of the distance is not rFD of the same images, the generator's part is measured against
    other images, or blur that rules the score goes unsaid."""
    root = write_images(tmp_path / "images", 20, size=32)
    model, images = vae.load_vae(tmp_vae), data.ImageFolder(root, 32)
    pixels = torch.stack([images[i][0] for i in range(20)])
    with torch.no_grad():
        posterior = model.encode(data.to_float(pixels))
        noise = data.draw_noise(0, range(20), 0, posterior.mean.shape[1:])[1]
        copies = data.to_uint8(model.decode(posterior.sample(noise))).permute(0, 2, 3, 1).numpy()
    write_npz(tmp_path / "copies.npz", copies, arr_1=np.array(images.labels))
    write_npz(tmp_path / "noise.npz", np.random.default_rng(0).integers(0, 256, copies.shape, np.uint8))
    command, found, out = ("fid", "score", root), [], ""
    for name in ("copies", "noise"):
        out += do(*command, tmp_path / f"{name}.npz", *judge, "--vae", tmp_vae, "--cache",
                  tmp_path / "cache.npz", "--json", tmp_path / f"{name}.json")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert found[-1]["inputs"]["vae"] == common.weights_hash(model.state_dict())
        file = tmp_path / f"{name}.npz"
        assert found[-1]["inputs"][str(file)] == hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    own, noise = (read_scores(tmp_path / f"{name}.json") for name in ("copies", "noise"))
    assert found[0]["floor"] == found[1]["floor"]
    assert own["fd_to_reconstructions"] == pytest.approx(0, abs=1e-3)
    assert own["precision_to_reconstructions"] == own["recall_to_reconstructions"] == 1
    assert own["rfd"] == noise["rfd"] == pytest.approx(own["fd"], rel=1e-4)
    assert noise["fd_to_reconstructions"] > 0.1
    assert out.count("the VAE's blur rules this score") == 1 + (noise["rfd"] > noise["fd"] / 2)
    assert "class_agreement" in own and "class_agreement" not in noise
    plain = do(*command, tmp_path / "copies.npz", *judge)
    assert "rfd" not in plain and "blur" not in plain
    assert "floor" in do(*command, "none", *judge)


def test_flags_of_the_score(tmp_vae, judge, tmp_path):
    """A VAE, a cache or a size that does not belong to the sources is used; what moved is not found."""
    root, x = write_images(tmp_path / "images", 8, size=32), np.zeros((8, 32, 32, 3), np.uint8)
    a, b = (write_npz(tmp_path / f"{n}.npz", x) for n in "ab")
    np.savez(tmp_path / "stats.npz", **stats_of(network="colours"))
    score = lambda *words: call("fid", "score", *words, *judge)
    assert_refused(score(root, a, "--resolution", 31, "--vae", tmp_vae), "31 pixels", "multiple of 4")
    assert_refused(score(tmp_path / "stats.npz", a, "--vae", tmp_vae), "--vae", "stats.npz", "images")
    assert_refused(score(root, a, b, "--vae", tmp_vae), "--vae", "2 sets")
    cache = tmp_path / "cache.npz"
    assert score(root, a, "--cache", cache)[0] == 0
    assert_refused(score(root, a, "--resolution", 16, "--cache", cache), "cache.npz", "crop 32", "crop 16")
    cache.write_bytes(cache.read_bytes()[:-40])
    assert_refused(score(root, a, "--cache", cache), "cache.npz", "delete it")
    assert "8 images" in score(root, a, "--dry-run", "--json", tmp_path / "dry.json")[1]
    assert not (tmp_path / "dry.json").exists()
    assert_refused(score(root, tmp_path / "gone.npz"), "gone.npz", "sample.py")
    assert_refused(call("fid", "report", "out/demo"), "extras/study.py demo out/demo")
    assert_refused(call("fid", "--bench", "5"), "extras/bench.py")


def test_psnr_by_hand():
    """PSNR has another peak, or overflows uint8."""
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = torch.stack([torch.full((3, 4, 4), 255), torch.full((3, 4, 4), 16)]).to(torch.uint8)
    assert fid.psnr(x, y).tolist() == pytest.approx([0, 20 * math.log10(255 / 16)])
    assert fid.psnr(y, y).tolist() == [math.inf] * 2


def test_ssim_is_skimages():
    """SSIM differs from scikit-image with the settings of the paper."""
    rng = np.random.default_rng(0)
    x = np.array(Image.fromarray(skimage.data.chelsea()).resize((48, 40)))
    y = np.clip(x + rng.normal(0, 20, x.shape), 0, 255).astype(np.uint8)
    expected = skimage.metrics.structural_similarity(x, y, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                                     use_sample_covariance=False, data_range=255)
    x, y = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (x, y))
    assert fid.ssim(x, y).item() == pytest.approx(expected, abs=1e-6)
    assert fid.ssim(x, x).item() == pytest.approx(1)


def test_feature_net():
    """Features for the distance are not the model's pooled features, or the input's scale is off."""
    net = fid.load_net("tf_efficientnet_lite0", LITE0, 32)
    peer = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    state = mapper.state_in_order(timm.create_model("tf_efficientnet_lite0"), LITE0)
    peer.load_state_dict({k: v for k, v in state.items() if "classifier" not in k})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(peer.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(net(images), peer((images / 255 - mean) / std), rtol=1e-4, atol=1e-4)
    assert net.label == "tf_efficientnet_lite0@32"
    assert (fid.count_name(50000), fid.count_name(1500)) == ("50k", "1500")


def test_vgg_features(vgg):
    """The judge VGG16 is not the mean of its last convolutions, or takes a file without them."""
    layers, path = vgg
    net, images = fid.load_net("vgg16", path, 64), torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    x = F.interpolate(images / 255, (64, 64), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = layers.eval()((x - mean) / std).mean((2, 3))
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    assert (net.label, net.dim) == ("vgg16-conv@64", 512)
    with pytest.raises(UserError, match="0.weight is missing"):
        fid.load_net("vgg16", LITE0, 64)
