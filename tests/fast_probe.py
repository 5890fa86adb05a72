from helpers import *  # noqa: F403

import functools

# ------------------------------------------------------------------------------------------------------------
# probe.py


@pytest.fixture(scope="session")
def vae_pair(tmp_path_factory):
    """40 images in two classes, and two VAEs with random weights, at 32 x 32."""
    out = tmp_path_factory.mktemp("vae_pair")
    write_images(out / "images", 40)
    for seed, name in enumerate(("vae.pt", "other.pt")):
        model = tiny_vae(seed, resolution=32)
        state = model.state_dict()
        common.save_checkpoint(out / name, dict(config=model.config, vae=state, ema=state))
    return out


def posterior_features(pair, images, order):
    encode = functools.partial(probe.posterior_mean, vae.load_vae(pair / "vae.pt"), "fp32")
    return probe.collect(images, order, encode, "vae")


def planted(n=400, d=10, seed=0):
    """Features of unequal scale, and two attributes that are linear in them (the second with noise)."""
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d) + 3).astype(np.float32)
    direction = np.random.default_rng(9).normal(size=(d, 2)) / X.std(0)[:, None]
    logits = (X - X.mean(0)) @ direction + rng.normal(size=(n, 2)) * [0, 2]
    return torch.from_numpy(X), torch.from_numpy((logits > 0.5).astype(np.float32))


def sklearn_probe(Z, y, strength):
    """scikit-learn's logistic regression, fitted on standardised features with known labels."""
    known = ~y.isnan()
    C = 1 / (known.sum().item() * strength)
    peer = sklearn.linear_model.LogisticRegression(C=C, max_iter=20000, tol=1e-8)
    return peer.fit(Z[known], y[known].numpy())


@pytest.mark.parametrize("strength,unknown", [(0.1, False), (0.003, False), (0.01, True)])
def test_probe_is_scikit_learns(strength, unknown, monkeypatch):
    """The probe stops early or has another objective; unknown labels count as 0, or change the penalty's
    weight."""
    monkeypatch.setattr(probe, "STRENGTHS", (strength,))
    X, Y = planted()
    if unknown:
        Y[::3, 0] = torch.nan
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    fitted = probe.fit_probe(X, Y, X, Y)
    assert fitted.strength.tolist() == pytest.approx([strength] * 2)
    for a in range(2):
        expected = sklearn_probe(Z, Y[:, a], strength).decision_function(Z)
        np.testing.assert_allclose(fitted(X)[:, a].numpy(), expected, atol=0.02 * abs(expected).max())
    Y = torch.cat([Y, torch.ones(len(Y), 1)], 1)
    with pytest.raises(UserError, match="attribute 2 is constant"):
        probe.fit_probe(X, Y, X, Y)


def test_probe_recovers_a_planted_attribute():
    """A linear attribute is not found on new images, or the strength is not chosen on the validation set."""
    X, Y = planted(1200)
    noise = torch.randn(1200, 1, generator=torch.Generator().manual_seed(0)).sign().clamp_min(0)
    Y = torch.cat([Y, noise], 1)  # the last attribute is told by nothing
    fitted = probe.fit_probe(X[:800], Y[:800], X[800:1000], Y[800:1000])
    result = probe.scores(Y[1000:], fitted(X[1000:]))["per_attribute"]
    assert result["f1"][0] > 0.95 and result["average_precision"][0] > 0.98
    assert fitted.strength[0] == pytest.approx(min(probe.STRENGTHS))
    assert fitted.strength[2] == pytest.approx(max(probe.STRENGTHS))


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


def test_pictures_with_a_black_border():
    """A picture on a black canvas: LAPACK's float32 eigh fails on the many rows of zeros, or the border
    counts."""
    torch.manual_seed(0)
    inside = torch.rand(200, 1, 4, 4).expand(-1, 3, -1, -1)  # grey: the channels repeat each other too
    canvas = F.pad(inside, (3, 3, 3, 3), value=-1.0).flatten(1)  # 252 of 300 columns are constant
    X, Y = inside.flatten(1), (inside[:, 0, 0, :2] > 0.5).float()
    mean, std, _, _ = probe.principal_axes(canvas, "cpu")
    assert std.isinf().sum() == 252 and mean.isfinite().all()
    expected = probe.fit_probe(X[:150], Y[:150], X[150:], Y[150:])(X)
    fitted = probe.fit_probe(canvas[:150], Y[:150], canvas[150:], Y[150:])
    torch.testing.assert_close(fitted(canvas), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    blank = probe.fit_probe(torch.ones(200, 300), Y, torch.ones(200, 300), Y)  # nothing but border
    assert (blank.weight == 0).all() and blank.bias.isfinite().all()


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


def test_scores_are_scikit_learns():
    """F1, average precision or balanced accuracy differ from scikit-learn's, or unknown labels count."""
    rng, m = np.random.default_rng(0), sklearn.metrics
    Y = (rng.random((300, 4)) < [0.5, 0.1, 0.9, 0.3]).astype(np.float32)
    logits = rng.normal(size=(300, 4)).astype(np.float32) + 0.7 * Y
    Y[rng.random(Y.shape) < 0.2] = np.nan
    result = probe.scores(torch.from_numpy(Y), torch.from_numpy(logits), torch.full((4,), 0.5))
    pairs = [(y[~np.isnan(y)], z[~np.isnan(y)]) for y, z in zip(Y.T, logits.T, strict=True)]
    expected = {"f1": [m.f1_score(y, z > 0) for y, z in pairs],
                "f1_tuned": [m.f1_score(y, z > 0.5) for y, z in pairs],
                "average_precision": [m.average_precision_score(y, z) for y, z in pairs],
                "balanced_accuracy": [m.balanced_accuracy_score(y, z > 0) for y, z in pairs]}
    for name, values in expected.items():
        assert result["per_attribute"][name] == pytest.approx(values, abs=1e-5)
        assert result[name] == pytest.approx(np.mean(values), abs=1e-5)
    y, z = (np.concatenate(c) for c in zip(*pairs, strict=True))
    assert result["f1_micro"] == pytest.approx(m.f1_score(y, z > 0), abs=1e-5)


def test_average_precision_of_equal_logits():
    """Equal logits are ranked by their place in the file."""
    Y, logits = torch.tensor([[1.0], [1], [0], [0], [0], [1]]), torch.tensor([[2.0], [1], [1], [1], [0], [0]])
    expected = sklearn.metrics.average_precision_score(Y[:, 0], logits[:, 0])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        assert probe.average_precision(Y[order], logits[order])[0] == pytest.approx(expected)
    assert probe.average_precision(torch.full((3, 1), torch.nan), torch.ones(3, 1)).item() == 0


def test_thresholds():
    """The tuned threshold is not the best one for F1, parts equal logits, or counts unknown labels."""
    def tuned(Y, logits):
        return probe.f1(Y, logits > probe.tune_thresholds(Y, logits)).item()

    torch.manual_seed(0)
    Y = (torch.rand(500, 1) < 0.2).float()
    logits = torch.randn(500, 1) + Y - 4  # never above 0
    best = max(probe.f1(Y, logits > t).item() for t in logits.flatten())
    assert tuned(Y, logits) == pytest.approx(best) and probe.f1(Y, logits > 0).item() == 0
    rare, falling = (torch.arange(500) < 3).float()[:, None], -torch.arange(500.0)[:, None]  # below 1 %
    assert tuned(rare, falling) == 1
    unknown = torch.cat([rare, torch.full((500, 1), torch.nan)])
    assert tuned(unknown, torch.cat([falling, torch.full((500, 1), 9.0)])) == 1
    tied = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[2.0], [1], [1], [0]])
    assert tuned(*tied) == pytest.approx(0.8)
    assert probe.tune_thresholds(torch.ones(4, 1), torch.tensor([[1.0], [1], [2], [2]])).item() < 1


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
    assert whole.dtype == torch.float32 and whole.shape == (40, math.prod(probe.latent_shape(tiny_vae(), 32)))
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


def test_gini_by_hand():
    """Gini's coefficient differs from half the mean difference over the mean; the density is another."""
    x = np.random.default_rng(0).gamma(1.0, size=60)
    assert probe.gini(x) == pytest.approx(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))
    assert probe.gini(np.ones(9)) == pytest.approx(0)
    plane = torch.from_numpy(np.random.default_rng(1).normal(size=(80, 2)))
    assert probe.kde_gini(torch.ones(5, 3)) is None
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    expected = probe.gini(scipy.stats.gaussian_kde(plane.numpy().T)(plane.numpy().T))
    turned = torch.cat([plane @ turn, torch.zeros(80, 3)], 1)  # of rank two
    assert probe.kde_gini(turned) == pytest.approx(expected, rel=1e-6)


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


def test_high_frequencies():
    """Smooth latents have power above half the Nyquist frequency, or white noise and stripes have too
    little."""
    x = torch.arange(16.0).expand(16, 16)
    wave = lambda f: torch.sin(2 * math.pi * f * x / 16)[None, None] + 5
    assert probe.high_frequency_share(wave(2)) == pytest.approx(0, abs=1e-6)
    assert probe.high_frequency_share(wave(7)) == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    assert probe.high_frequency_share(torch.randn(200, 4, 16, 16)) == pytest.approx(0.8, abs=0.03)


def test_equivariance_by_hand():
    """An encoder that moves and shrinks with its image has an error; one that does not has none."""
    class Linear:
        factor = 4

        def encode(self, x):
            return SimpleNamespace(mean=F.avg_pool2d(x.mean(1, keepdim=True), 4))

    class Anchored(Linear):
        def encode(self, x):
            z = super().encode(x).mean
            return SimpleNamespace(mean=z + 3 * torch.linspace(-1, 1, z.shape[-1]))

    ramp = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)  # half a cell is half the step between two cells
    one = torch.ones(1, 1, 1, 1)
    shift, scale = probe.equivariance(Linear(), ramp, Linear().encode(ramp).mean, one)
    assert shift < 1e-8 and scale < 1e-3
    shift, scale = probe.equivariance(Anchored(), ramp, Anchored().encode(ramp).mean, one)
    assert shift > 1e-3


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
    for name in ("kde_gini", "gmm_nll", "high_frequency_share"):
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
    assert sheet.shape == (2 * (18 + 2 * 38), 150 + 4 * 102, 3)
    for top, left, picture in ((18, 150 + 64, pictures[0][0, 2]), (18 + 38, 150 + 102, pictures[1][1, 0]),
                               (94 + 18, 150, 255 - pictures[0][0, 0])):
        assert np.array_equal(sheet[top:top + 32, left:left + 32], picture.permute(1, 2, 0).numpy())


def labelled(pair, folder):
    """A copy of the pair's images with a table in no order: 17 train, 14 val, 9 test -> (folder, rows in the
    order of the splits, labels (40, 2) in that order)."""
    images, rng = data.ImageFolder(pair / "images", 32), np.random.default_rng(0)
    order = np.random.default_rng(1).permutation(40)
    splits = ["train"] * 17 + ["val"] * 14 + ["test"] * 9
    labels = np.array([[i % 2, i % 3 == 0] for i in range(40)])
    shutil.copytree(pair / "images", folder)
    rows = zip(order, splits, labels, strict=True)
    lines = [f"{images.files[i]},{s},{a},{int(b)},1" for i, s, (a, b) in rows]
    text = "file,split,a,b,constant\n" + "\n".join(lines[k] for k in rng.permutation(40)) + "\n"
    (folder / "attributes.csv").write_text(text)
    return folder, order, torch.from_numpy(labels.astype(np.float32))


def test_probe_command_is_its_parts(vae_pair, tmp_path):
    """Scores are of another split than test, thresholds or strengths are chosen elsewhere than on val, or a
    set is cut in the wrong place."""
    root, order, Y = labelled(vae_pair, tmp_path / "images")
    flags = ("--json", tmp_path / "a.json", "--precision", "fp32")
    out = do("probe", vae_pair / "vae.pt", "--data", root, *flags)
    assert "left out, constant in a split: constant" in out
    assert "2 attributes; 17 train, 14 val, 9 test images" in out
    images = data.ImageFolder(root, 32)
    X = vae.load_vae(vae_pair / "vae.pt").encode(data.to_float(torch.stack([images[i][0] for i in order])))
    X = X.mean.flatten(1)
    fitted = probe.fit_probe(X[:17], Y[:17], X[17:31], Y[17:31])
    thresholds = probe.tune_thresholds(Y[17:31], fitted(X[17:31]))
    expected = probe.scores(Y[31:], fitted(X[31:]), thresholds)
    record = json.loads((tmp_path / "a.json").read_text())
    found = record["results"][str(vae_pair / "vae.pt")]
    assert record["n"] == {"train": 17, "val": 14, "test": 9} and record["left_out"] == ["constant"]
    assert record["inputs"]["data"] == images.hash and len(record["inputs"]) == 2
    assert found["strength"] == pytest.approx(fitted.strength.tolist())
    for k in ("f1", "f1_tuned", "average_precision", "balanced_accuracy", "f1_micro"):
        assert found[k] == pytest.approx(expected[k], abs=1e-6), k
    prior = torch.logit(Y[:17].mean(0)).expand(9, -1)
    assert record["results"]["majority"]["f1"] == pytest.approx(probe.scores(Y[31:], prior)["f1"])


def test_probe_with_everything(vae_pair, tmp_path):
    """The table, rivals, pictures, interval, differences or the table of attributes lack something."""
    root, _, _ = labelled(vae_pair, tmp_path / "images")
    first, second = vae_pair / "vae.pt", vae_pair / "other.pt"
    out = do("probe", first, second, "--data", root, "--rivals", "--png", tmp_path / "a.png", "--show", "b",
             "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    result = json.loads((tmp_path / "a.json").read_text())["results"]
    scores = result[str(first)]
    assert "top5_recall" not in scores  # of two attributes it is always 1
    assert {"f1", "class_accuracy", "kde_gini", "high_frequency_share", "shift_error", "scale_error", "psnr",
            "f1_interval", "reached", "leak"} <= scores.keys()
    assert "minus" in out and ("within chance" in out or "beyond" in out)
    assert Image.open(tmp_path / "a.png").size == (150 + 4 * 102, 2 * (18 + 38))
    rows = list(csv.DictReader(open(tmp_path / "a.csv")))
    assert [r["attribute"] for r in rows] == ["a", "b"]
    assert [float(r[f"{first} f1"]) for r in rows] == pytest.approx(scores["per_attribute"]["f1"], abs=1e-4)
    out = do("probe", first, second, "--data", root, "--resolution", 96, "--dry-run")
    assert "2 attributes, 40 images of 96 x 96" in out and "the median short side is 64" in out


@pytest.mark.parametrize("flags,words", [
    (("--png", "a.png", "--show", "Hat"), ["--show Hat", "a, b"]),
    (("--png", "a.png", "--show", "constant"), ["--show constant", "a, b"]),
    (("--show", "a"), ["--show", "without --png"]),
    (("--grid", 4), ["--grid", "without --vfm"]),
    (("--vfm-layer", 4), ["--vfm-layer", "without --vfm"]),
    (("--csv", "."), ["is a folder"]),
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
    assert_refused(call("probe", "correlate", "out/demo", "--png", "a.png"),
                   "python extras/correlate.py out/demo --png a.png")
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    assert_refused(call("probe", first, "--data", root, "--rivals"), "pip install scikit-learn")
    text = (root / "attributes.csv").read_text()
    (root / "attributes.csv").write_text(text.replace("val", "train"))
    assert_refused(call("probe", first, "--data", root), "no attribute", "train, val and test")
