from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# fid.py

def gaussian(seed, n=500, d=12):
    return fid.statistics(np.random.default_rng(seed).normal(size=(n, d)) @ np.random.default_rng(seed + 1).normal(size=(d, d)) + seed)


def test_frechet_distance_is_scipys():
    """The distance differs from the definition with scipy's matrix square root."""
    (m1, s1), (m2, s2) = gaussian(0), gaussian(2)
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9 * np.trace(s1))


def test_frechet_distance_diagonal():
    """The distance of independent dimensions is not |mu1 - mu2|^2 + sum (sd1 - sd2)^2."""
    sd1, sd2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    expected = 4 * 3 + np.square(sd1 - sd2).sum()
    assert fid.frechet_distance(np.zeros(3), np.diag(sd1 ** 2), np.full(3, 2.0), np.diag(sd2 ** 2)) == pytest.approx(expected)


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
    """Mean or covariance is biased, or of the wrong axis."""
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    mean, covariance = fid.statistics(x)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0))
    np.testing.assert_allclose(covariance, centred.T @ centred / 49)
    assert mean.dtype == covariance.dtype == np.float64


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Random weights of the Inception network whose activations keep a sane scale, as a file."""
    torch.manual_seed(0)
    net = fid.FIDInception(weights=False).net
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, path)  # as converted from TensorFlow
    return path


@pytest.mark.parametrize("height,width", [(64, 80), (256, 256), (299, 299), (320, 311)])
def test_inception_is_torch_fidelitys(height, width, inception):
    """Features or class probabilities differ from torch-fidelity's with the same weights: pools, resize, scale or the logits' bias."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    peer = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception))
    x = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    seen = []
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        pool, logits = peer(x)
    ours, spatial, probabilities = fid.FIDInception(inception).features(x)
    assert pool.std() > 0.05
    torch.testing.assert_close(ours, pool, rtol=0, atol=1e-4)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(spatial.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1), rtol=0, atol=1e-4)  # rows, columns, channels


def test_inception_is_pytorch_fids(inception, monkeypatch):
    """With half-pixel resize the features differ from pytorch-fid's with the same weights."""
    import pytorch_fid.inception
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(inception))
    peer, x = pytorch_fid.inception.InceptionV3([3]).eval(), torch.randint(0, 256, (2, 3, 100, 256), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(fid.FIDInception(inception, half_pixel=True)(x), peer(x / 255)[0].flatten(1), rtol=0, atol=1e-4)


def test_inception_weights_that_cannot_be_had(inception, tmp_path, monkeypatch):
    """Weights that miss, do not fit or cannot be fetched end in a traceback or in random features."""
    state = torch.load(inception)
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("no weights")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: (_ for _ in ()).throw(RuntimeError('invalid hash value (expected "6726825d", got "0")')))
    for ckpt, words in ((tmp_path / "part.pth", "Mixed_7c.branch_pool.conv.weight is missing"), (tmp_path / "text.pth", "text.pth"),
                        (tmp_path / "none.pth", "none.pth"), (None, "6726825d.*--net-ckpt")):
        with pytest.raises(UserError, match=words):
            fid.FIDInception(ckpt)
    with pytest.raises(UserError, match="299"):
        fid.load_net("inception", inception, 96)


def test_inception_score_by_hand():
    """IS is another average: of splits, of the exponent, or a class without weight turns it into NaN."""
    probs = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 11).astype(np.float32)
    probs[0] = [1, 0, 0, 0, 0, 0]
    expected = []
    for part in (probs[:4].astype(float), probs[4:8].astype(float), probs[8:].astype(float)):
        mean = part.mean(0)
        expected.append(np.exp(np.mean([sum(p * np.log(p / m) for p, m in zip(row, mean) if p > 0) for row in part])))
    assert fid.inception_score(probs, split=4) == pytest.approx(np.mean(expected), rel=1e-6)
    assert fid.inception_score(np.full((7, 4), 0.25)) == pytest.approx(1) and fid.inception_score(np.eye(5)) == pytest.approx(5)


def test_precision_recall_by_hand(monkeypatch):
    """Precision and recall count other balls than those of the third neighbour, or blocks lose pairs."""
    rng = np.random.default_rng(0)
    ref, sample = rng.standard_normal((31, 4)).astype(np.float32), (rng.standard_normal((23, 4)) * 0.7 + 0.8).astype(np.float32)
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


def test_moments_in_pieces():
    """Streamed statistics lose digits to a large mean, or weigh rows wrongly."""
    x = np.random.default_rng(0).standard_normal((200, 5)).astype(np.float32) + 1000
    moments = fid.Moments()
    for part in np.array_split(x, 7):
        moments.add(part)
    np.testing.assert_allclose(moments.result()[0], x.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.result()[1], np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)
    counts = np.arange(200) % 3
    np.testing.assert_allclose(fid.statistics(x, counts)[1], np.cov(np.repeat(x.astype(float), counts, 0), rowvar=False), rtol=1e-9, atol=1e-12)


def test_score_is_adms(inception, tmp_path):
    """FID, sFID, IS, precision and recall of the command differ from the functions on the features, or statistics files change them."""
    rng = np.random.default_rng(0)
    sets = {n: rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8) // (1 + i) for i, n in enumerate(("ref", "one"))}
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    net = fid.FIDInception(inception)
    features = {n: net.features(torch.from_numpy(images).permute(0, 3, 1, 2)) for n, images in sets.items()}
    common = ("--net-ckpt", inception, "--json", tmp_path / "a.json")
    out = do("fid", "score", tmp_path / "ref.npz", tmp_path / "one.npz", *common, "--save-stats", tmp_path / "stats.npz", "--bootstrap", 2)
    result = json.loads((tmp_path / "a.json").read_text())
    stats = lambda f: (np.mean(f.double().numpy(), 0), np.cov(f.double().numpy(), rowvar=False))
    s, (pool, spatial, probabilities) = result["scores"][str(tmp_path / "one.npz")], features["one"]
    assert s["fd"] == pytest.approx(fid.frechet_distance(*stats(features["ref"][0]), *stats(pool)), rel=1e-4)
    assert s["sfid"] == pytest.approx(fid.frechet_distance(*stats(features["ref"][1]), *stats(spatial)), rel=1e-4)
    assert s["inception_score"] == pytest.approx(fid.inception_score(probabilities), rel=1e-4)
    assert (s["precision"], s["recall"]) == pytest.approx(fid.precision_recall(features["ref"][0], pool))
    assert 0 < s["interval"] < s["fd"]
    assert f"FID-40 {s['fd']:.2f} +- {s['interval']:.2f}, sFID {s['sfid']:.2f}, IS {s['inception_score']:.2f}, precision" in out
    assert result["metric"] == "FID" and result["network"] == "inception" and len(result["weights"]) == 16 and "TensorFlow" in result["resize"]
    assert "40 images are few" in out and "floor" in out and result["weights"] in out
    saved = np.load(tmp_path / "stats.npz")
    assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(saved.files) and saved["mu_s"].shape == (2023,)
    adm = {k: saved[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", arr_0=sets["ref"][:10], **adm)  # as ADM's reference files: statistics of all, images of some
    for reference, more in (("adm", True), ("stats", False)):
        do("fid", "score", tmp_path / f"{reference}.npz", tmp_path / "one.npz", *common)
        s = json.loads((tmp_path / "a.json").read_text())["scores"][str(tmp_path / "one.npz")]
        assert [s[k] for k in ("fd", "sfid")] == pytest.approx([result["scores"][str(tmp_path / "one.npz")][k] for k in ("fd", "sfid")], rel=1e-6)
        assert ("recall" in s) == more and "inception_score" in s


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
        assert source.n == 9 and np.array_equal(source.images([0, 8]).permute(0, 2, 3, 1).numpy(), x[[0, 8]])


@pytest.mark.parametrize("make,words", [
    (lambda x: dict(images=x), ["arr_0", "mu"]), (lambda x: dict(arr_0=x.transpose(0, 3, 1, 2)), ["(9, 3, 8, 8)", "NHWC"]),
    (lambda x: dict(arr_0=x / 127.5 - 1), ["float64", "-1 to 1", "0 to 255"]), (lambda x: dict(arr_0=x[:1]), ["1 images"]), (lambda x: dict(arr_0=x[..., :1]), ["(9, 8, 8, 1)"]),
    (lambda x: dict(arr_0=np.array([{}], object)), ["x.npz"]), (lambda x: dict(mu=np.zeros(3), sigma=np.zeros((3, 3))), ["inception with 3 dimensions", "1280"]),
    (lambda x: dict(mu=np.zeros(3), sigma=np.zeros(3)), ["(3,)"]), (lambda x: dict(mu=np.zeros(1280), sigma=np.full((1280, 1280), np.nan), network="tf_efficientnet_lite0@32"), ["not finite"]),
    (lambda x: dict(mu=np.zeros(1280), sigma=np.eye(1280)), ["statistics of inception"]),
    (lambda x: dict(mu=np.zeros(1280), sigma=np.eye(1280), network="tf_efficientnet_lite0@32", weights="0123"), ["weights 0123"]),
    (lambda x: dict(mu=np.zeros(1280), sigma=np.eye(1280), network="inception"), ["statistics of inception"])])
def test_bad_sample_files(make, words, tmp_path):
    """A file of another layout, range, type or network is scored, or ends in a traceback."""
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    x[0, 0, 0, :2] = 0, 255
    np.savez(tmp_path / "good.npz", arr_0=x)
    np.savez(tmp_path / "x.npz", **make(x))
    assert_refused(call("fid", "score", tmp_path / "good.npz", tmp_path / "x.npz", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32), *words)


def test_warnings_of_the_score(tmp_path, monkeypatch):
    """JPEG samples, unequal counts and features that are not finite pass in silence."""
    write_images(tmp_path / "ref", 12, size=32), write_images(tmp_path / "jpeg", 8, size=32), write_images(tmp_path / "png", 6, size=32)
    for path in (tmp_path / "jpeg").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    common = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    out = do("fid", "score", tmp_path / "ref", tmp_path / "jpeg", tmp_path / "png", *common)
    assert "jpeg holds JPEG files" in out and "6 and 8 images" in out and "png holds" not in out
    monkeypatch.setattr(fid.FeatureNet, "forward", lambda self, images: torch.full((len(images), 1280), torch.nan))
    assert_refused(call("fid", "score", tmp_path / "ref", tmp_path / "png", *common), "ref", "not finite")


def test_recon_scores(small, vgg, tmp_path):
    """rFID or LPIPS of the command differ from the functions on the same crops."""
    do("fid", "recon", "--vae", small / "vae/vae.pt", "--data", small / "images", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32,
       "--lpips-ckpt", vgg[1], "--json", tmp_path / "a.json")
    result, images = json.loads((tmp_path / "a.json").read_text()), data.ImageFolder(small / "images", 32)
    pixels = torch.stack([images[i][0] for i in range(40)])
    model, net = vae.load_vae(small / "vae/vae.pt"), fid.FeatureNet("tf_efficientnet_lite0", LITE0, 32)
    with torch.no_grad():
        y = data.to_uint8(model.decode(model.encode(data.to_float(pixels)).mean))
        expected = fid.build_lpips(vgg[1], torch.device("cpu"))(data.to_float(pixels), data.to_float(y)).mean().item()
    assert result["lpips"] == pytest.approx(expected, rel=1e-4)
    assert result["fd"] == pytest.approx(fid.frechet_distance(*fid.statistics(net(pixels)), *fid.statistics(net(y))), rel=1e-3)
    assert result["metric"] == "FD(tf_efficientnet_lite0@32)" and result["psnr"] == pytest.approx(fid.psnr(pixels, y).mean().item(), rel=1e-5)


def test_scores_against_the_reconstructions(small, tmp_path):
    """The VAE's part of the distance is not rFD of the same images, the generator's part is measured against other images, or blur that rules the score goes unsaid."""
    net = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    model, images = vae.load_vae(small / "vae/vae.pt"), data.ImageFolder(small / "images", 32)
    pixels = torch.stack([images[i][0] for i in range(40)])
    with torch.no_grad():
        posterior = model.encode(data.to_float(pixels))
        copies = data.to_uint8(model.decode(posterior.sample(data.draw_noise(0, range(40), 0, posterior.mean.shape[1:])[1])))
    np.savez(tmp_path / "copies.npz", arr_0=copies.permute(0, 2, 3, 1).numpy(), arr_1=np.array(images.labels))
    np.savez(tmp_path / "noise.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
    command, out, found = ("fid", "score", small / "images"), "", []
    for name in ("copies", "noise"):
        out += do(*command, tmp_path / f"{name}.npz", "--resolution", 32, *net, "--vae", small / "vae/vae.pt", "--cache", tmp_path / "cache.npz", "--json", tmp_path / f"{name}.json")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert found[-1]["inputs"]["vae"] == common.weights_hash(model.state_dict())
    own, noise = (list(f["scores"].values())[0] for f in found)
    assert found[0]["floor"] == found[1]["floor"]
    assert own["fd_to_reconstructions"] == pytest.approx(0, abs=1e-3) and own["precision_to_reconstructions"] == own["recall_to_reconstructions"] == 1
    assert own["rfd"] == noise["rfd"] == pytest.approx(own["fd"], rel=1e-4) and noise["fd_to_reconstructions"] > 3
    assert out.count("the VAE's blur rules this score") == 1 + (noise["rfd"] > noise["fd"] / 2)
    assert "class_agreement" in own and "class_agreement" not in noise
    plain = do("fid", "score", small / "images", tmp_path / "copies.npz", "--resolution", 32, *net)
    assert "rFD" not in plain and "blur" not in plain
    assert_refused(call("fid", "score", small / "images", tmp_path / "copies.npz", "--resolution", 31, *net, "--vae", small / "vae/vae.pt"), "vae.pt", "31 pixels", "multiple of 4")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(1280), sigma=np.eye(1280), network="tf_efficientnet_lite0@32")
    assert_refused(call("fid", "score", tmp_path / "stats.npz", tmp_path / "copies.npz", *net, "--vae", small / "vae/vae.pt"), "--vae", "stats.npz", "images")
    assert_refused(call(*command, tmp_path / "copies.npz", tmp_path / "noise.npz", "--resolution", 32, *net, "--vae", small / "vae/vae.pt"), "--vae", "2 sets")
    assert_refused(call(*command, tmp_path / "copies.npz", "--resolution", 16, *net, "--cache", tmp_path / "cache.npz"), "cache.npz", "crop 32", "crop 16")
    (tmp_path / "cache.npz").write_bytes((tmp_path / "cache.npz").read_bytes()[:-40])
    assert_refused(call(*command, tmp_path / "copies.npz", "--resolution", 32, *net, "--cache", tmp_path / "cache.npz"), "cache.npz", "delete it")
    assert "floor" in do(*command, "none", "--resolution", 32, *net) and "copies" not in do(*command, "none", "--resolution", 32, *net)


def test_class_agreement():
    """Samples of the wrong class agree, those of the right one do not, or the classifier is scored on what it was fitted to."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    centres = rng.normal(size=(3, 20)) * 3
    draw = lambda y: centres[y] + rng.normal(size=(len(y), 20))
    asked = rng.integers(0, 3, 300)
    assert fid.class_agreement(draw(labels), labels, draw(asked), asked) == pytest.approx((1, 1), abs=0.02)
    assert fid.class_agreement(draw(labels), labels, draw((asked + 1) % 3), asked)[0] < 0.02
    blind = fid.class_agreement(rng.normal(size=(600, 400)), labels, rng.normal(size=(300, 400)), asked)  # 400 dimensions of noise: 480 rows are fitted well, others not
    assert max(blind) < 0.5


def test_vgg_features(vgg):
    """The judge VGG16 is not the mean of its last convolutions, or takes a file without them."""
    layers, path = vgg
    net, images = fid.load_net("vgg16", path, 64), torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    x = F.interpolate(images / 255, (64, 64), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        expected = layers.eval()((x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    assert (net.label, net.dim) == ("vgg16-conv@64", 512)
    with pytest.raises(UserError, match="0.0.weight is missing"):
        fid.load_net("vgg16", LITE0, 64)


def test_packaged_vgg16(tmp_path):
    """A convolution's axes are turned round on the way from the package, or its pickle may name more than arrays."""
    rng = np.random.default_rng(0)
    places = [(i, m) for i, m in enumerate(torchvision.models.vgg16(weights=None).features) if isinstance(m, nn.Conv2d)]
    arrays = {f"Conv_{k}": dict(kernel=rng.normal(size=(3, 3, m.in_channels, m.out_channels)).astype(np.float32), bias=np.full(m.out_channels, k, np.float32)) for k, (_, m) in enumerate(places)}
    state = extras_vgg16.convert(arrays)
    torchvision.models.vgg16(weights=None).features.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    assert state["features.2.weight"][5, 7, 0, 2] == arrays["Conv_1"]["kernel"][0, 2, 7, 5] and state["features.28.bias"][0] == 12
    read = lambda value: extras_vgg16.ArraysOnly(io.BytesIO(pickle.dumps(value, 3))).load()
    assert (read(arrays)["Conv_3"]["kernel"] == arrays["Conv_3"]["kernel"]).all()
    with pytest.raises(UserError, match="posix.system|nt.system"):
        read(os.system)


def test_oracle(avatars, tmp_path):
    """The oracle VFM does not learn its attributes, does not load as a VFM, or the random one is not the same network untrained."""
    do("extras.oracle", avatars, tmp_path / "random.safetensors", "--steps", 0)
    out = do("extras.oracle", avatars, tmp_path / "oracle.safetensors", "--steps", 12)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step ")]
    assert losses[-1] < 0.9 * losses[0] and "macro F1 of 78 attributes on 50 test images" in out
    tokens = [mapper.VFM("resnet10t", 32, 8, str(tmp_path / f"{name}.safetensors"))(torch.rand(2, 3, 32, 32) * 2 - 1) for name in ("random", "oracle")]
    assert tokens[0].shape == tokens[1].shape == (2, 64, 256) and not torch.allclose(tokens[0], tokens[1], atol=0.1)
    first = safetensors.torch.load_file(tmp_path / "random.safetensors")
    torch.manual_seed(0)
    assert torch.equal(first["conv1.0.weight"], timm.create_model("resnet10t").state_dict()["conv1.0.weight"])
    assert "already there" in do("extras.oracle", avatars, tmp_path / "oracle.safetensors")


def test_exported_weights(small, tmp_path):
    """The small file that is passed on holds another VAE than the checkpoint's average, loses its shape, or a cut one passes."""
    do("vae", "export", "--vae", small / "vae/vae.pt", "--out", tmp_path / "a.safetensors")
    ours, theirs = vae.load_vae(tmp_path / "a.safetensors"), vae.load_vae(small / "vae/vae.pt")
    assert ours.config == theirs.config
    for (k, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=k)
    do("train_vae", "--data", small / "images", "--init", tmp_path / "a.safetensors", "--batch", 4, "--steps", 1, "--lpips", 0, *PLAIN, *FP32, "--out", tmp_path / "tuned")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as f:
        source = json.loads(f.metadata()["made"])["source"]
    assert "--preset demo" in source["command"] and str(small) not in source["command"]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    assert_refused(call("train_vae", "--data", small / "images", "--init", tmp_path / "cut.safetensors", "--lpips", 0, *PLAIN, "--out", tmp_path / "x"), "cut.safetensors", "not a readable checkpoint")
    assert_refused(call("vae", "export", "--vae", small / "vae/vae.pt", "--out", tmp_path / "a.pt"), "--out", ".safetensors")


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
    assert fid.ssim(x, y).item() == pytest.approx(expected, abs=1e-6) and fid.ssim(x, x).item() == pytest.approx(1)


def test_feature_net():
    """Features for the distance are not the model's pooled features, or the input's scale is off."""
    net = fid.FeatureNet("tf_efficientnet_lite0", LITE0, 64)
    peer = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    peer.load_state_dict({k: v for k, v in mapper.state_in_order(timm.create_model("tf_efficientnet_lite0"), LITE0).items() if "classifier" not in k})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = peer(unit_normal(images / 127.5 - 1, peer.pretrained_cfg))
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    assert net.label == "tf_efficientnet_lite0@64" and (fid.count_name(50000), fid.count_name(1500)) == ("50k", "1500")
