from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# probe.py

def planted(n=400, d=10, seed=0):
    """Features of unequal scale, and two attributes that are linear in them (the second with noise)."""
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d) + 3).astype(np.float32)
    direction = np.random.default_rng(9).normal(size=(d, 2)) / X.std(0)[:, None]
    logits = (X - X.mean(0)) @ direction + rng.normal(size=(n, 2)) * [0, 2]
    return torch.from_numpy(X), torch.from_numpy((logits > 0.5).astype(np.float32))


def test_probe_is_scikit_learns(monkeypatch):
    """The probe stops early or has another objective than logistic regression with an L2 penalty."""
    X, Y = planted()
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    for strength in (0.1, 0.003):
        monkeypatch.setattr(probe, "STRENGTHS", (strength,))
        fitted = probe.fit_probe(X, Y, X, Y)
        assert fitted.strength.tolist() == pytest.approx([strength] * 2)
        for a in range(2):
            peer = sklearn.linear_model.LogisticRegression(C=1 / (len(X) * strength), tol=1e-8, max_iter=10000).fit(Z, Y[:, a].numpy())
            np.testing.assert_allclose(fitted(X)[:, a].numpy(), peer.decision_function(Z), atol=0.02 * abs(peer.decision_function(Z)).max())


def test_probe_ignores_unknown_labels(monkeypatch):
    """Unknown labels count as 0, or change the weight of the penalty."""
    monkeypatch.setattr(probe, "STRENGTHS", (0.01,))
    X, Y = planted()
    Y[::3, 0] = np.nan
    known = ~Y[:, 0].isnan()
    fitted = probe.fit_probe(X, Y, X, Y)
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    peer = sklearn.linear_model.LogisticRegression(C=1 / (known.sum().item() * 0.01), tol=1e-8, max_iter=10000).fit(Z[known], Y[known, 0].numpy())
    np.testing.assert_allclose(fitted(X)[:, 0].numpy(), peer.decision_function(Z), atol=0.02 * abs(peer.decision_function(Z)).max())
    with pytest.raises(UserError, match="constant"):
        probe.fit_probe(X, torch.cat([Y, torch.ones(len(Y), 1)], 1), X, torch.cat([Y, torch.ones(len(Y), 1)], 1))


def test_probe_recovers_a_planted_attribute():
    """A linear attribute is not found on new images, or the strength is not chosen on the validation set."""
    X, Y = planted(1200)
    noise = torch.randn(1200, 1, generator=torch.Generator().manual_seed(0)).sign().clamp_min(0)  # an attribute that nothing tells
    Y = torch.cat([Y, noise], 1)
    fitted = probe.fit_probe(X[:800], Y[:800], X[800:1000], Y[800:1000])
    result = probe.scores(Y[1000:], fitted(X[1000:]))
    assert result["per_attribute"]["f1"][0] > 0.95 and result["per_attribute"]["average_precision"][0] > 0.98
    assert fitted.strength[0] == pytest.approx(min(probe.STRENGTHS)) and fitted.strength[2] == pytest.approx(max(probe.STRENGTHS))


def test_scores_are_scikit_learns():
    """F1, average precision or balanced accuracy differ from scikit-learn's, or unknown labels count."""
    rng = np.random.default_rng(0)
    Y, logits = (rng.random((300, 4)) < [0.5, 0.1, 0.9, 0.3]).astype(np.float32), rng.normal(size=(300, 4)).astype(np.float32)
    logits += 0.7 * Y
    Y[rng.random(Y.shape) < 0.2] = np.nan
    result = probe.scores(torch.from_numpy(Y), torch.from_numpy(logits), torch.full((4,), 0.5))
    pairs = [(Y[~np.isnan(Y[:, a]), a], logits[~np.isnan(Y[:, a]), a]) for a in range(4)]
    m = sklearn.metrics
    expected = {"f1": [m.f1_score(y, z > 0) for y, z in pairs], "f1_tuned": [m.f1_score(y, z > 0.5) for y, z in pairs],
                "average_precision": [m.average_precision_score(y, z) for y, z in pairs],
                "balanced_accuracy": [m.balanced_accuracy_score(y, z > 0) for y, z in pairs]}
    for name, values in expected.items():
        assert result["per_attribute"][name] == pytest.approx(values, abs=1e-5) and result[name] == pytest.approx(np.mean(values), abs=1e-5)
    y, z = (np.concatenate(c) for c in zip(*pairs))
    assert result["f1_micro"] == pytest.approx(m.f1_score(y, z > 0), abs=1e-5)


def test_thresholds():
    """The tuned threshold is not (near) the best one for F1."""
    torch.manual_seed(0)
    Y = (torch.rand(500, 1) < 0.2).float()
    logits = torch.randn(500, 1) + Y - 4  # never above 0
    best = max(probe.f1(Y, logits > t).item() for t in logits.flatten())
    tuned = probe.f1(Y, logits > probe.tune_thresholds(Y, logits)).item()
    assert tuned == pytest.approx(best) and probe.f1(Y, logits > 0).item() == 0
    rare, unknown = (torch.arange(500) < 3).float()[:, None], torch.full((500, 1), torch.nan)  # below 1 %
    logits = -torch.arange(500.0)[:, None]
    assert probe.f1(rare, logits > probe.tune_thresholds(rare, logits)).item() == 1
    assert probe.f1(rare, logits > probe.tune_thresholds(torch.cat([rare, unknown]), torch.cat([logits, torch.full((500, 1), 9.0)]))).item() == 1
    tied, logits = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[2.0], [1], [1], [0]])  # equal logits are not parted
    assert probe.f1(tied, logits > probe.tune_thresholds(tied, logits)).item() == pytest.approx(0.8)
    assert probe.tune_thresholds(torch.ones(4, 1), torch.tensor([[1.0], [1], [2], [2]])).item() < 1


# ---------------------------------------------------------------------------------------------------------------------
# probe.py: large features, other data sets, the rivals, correlations

def test_probe_converges():
    """The solver stops away from the minimum: another strength, start or direction than scikit-learn's at its default tolerance."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 60)) @ rng.normal(size=(60, 60)) * rng.uniform(0.01, 30, 60)  # correlated columns of unequal scale
    Y = (X @ (rng.normal(size=(60, 4)) / X.std(0)[:, None]) + 3 * rng.normal(size=(600, 4)) > [0, 4, -4, 12]).astype(np.float32)
    X, Y = torch.from_numpy(X + 20 * X.std(0)).float(), torch.from_numpy(Y)  # far from 0
    fitted = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:], steps=40)
    Z = ((X - X[:400].mean(0)) / X[:400].std(0)).numpy()
    for a in range(4):
        peers = {s: sklearn.linear_model.LogisticRegression(C=1 / (400 * s), tol=1e-9, max_iter=20000).fit(Z[:400], Y[:400, a].numpy()) for s in probe.STRENGTHS}
        losses = {s: sklearn.metrics.log_loss(Y[400:, a].numpy(), p.predict_proba(Z[400:])) for s, p in peers.items()}
        chosen = min(losses, key=losses.get)
        assert fitted.strength[a].item() == pytest.approx(chosen), losses
        expected = peers[chosen].decision_function(Z)
        np.testing.assert_allclose(fitted(X)[:, a].numpy(), expected, atol=0.01 * np.abs(expected).max())


def test_probe_in_pieces_and_blocks(monkeypatch, tmp_path):
    """Features in pieces, in blocks of columns or in a float16 file give another probe than the same features in memory."""
    X, Y = planted(500)
    Y[::7, 1] = np.nan
    whole = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:], tolerance=1e-6)
    stored = torch.from_numpy(np.memmap(tmp_path / "x", np.float16, "w+", shape=tuple(X.shape)))
    stored.copy_(X)
    for features, piece, block, tolerance in ((X, 30, 2048, 1e-4), (X, 10 ** 6, 5, 1e-3), (stored, 30, 3, 1e-2)):
        monkeypatch.setattr(probe, "PIECE", piece * X.shape[1]), monkeypatch.setattr(probe, "BLOCK", block)
        fitted = probe.fit_probe(features[:400], Y[:400], features[400:], Y[400:], tolerance=1e-6)
        assert torch.equal(fitted.strength, whole.strength)
        torch.testing.assert_close(fitted(features[400:]), whole(X[400:]), rtol=0, atol=tolerance * whole(X[400:]).abs().max().item())


def test_ill_conditioned_features_converge(capsys):
    """The principal axes do not help: after a few steps the objective is above scikit-learn's; or a stop before the minimum is not told."""
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(900, 300)).cumsum(1)).float()  # neighbours are alike, as pixels are
    Y = torch.from_numpy((X.numpy() @ (rng.normal(size=(300, 2)) / 300) + 0.3 * rng.normal(size=(900, 2)) > 0).astype(np.float32))
    fitted = probe.fit_probe(X, Y, X, Y, steps=25)
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    for a in range(2):
        strength = fitted.strength[a].item()
        peer = sklearn.linear_model.LogisticRegression(C=1 / (900 * strength), tol=1e-8, max_iter=20000).fit(Z, Y[:, a].numpy())
        def objective(logits, w):
            return F.binary_cross_entropy_with_logits(torch.as_tensor(logits).double(), Y[:, a].double()).item() + 0.5 * strength * np.square(w).sum()
        least = objective(peer.decision_function(Z), peer.coef_[0])
        assert objective(fitted(X)[:, a], (fitted.weight[:, a] * X.std(0)).numpy()) < 1.01 * least
    assert "stopped at gradient" not in capsys.readouterr().out
    probe.fit_probe(X, Y, X, Y, steps=2)
    assert "strength 0.1 stopped at gradient" in capsys.readouterr().out


def test_constant_columns_change_nothing(monkeypatch):
    """A column that is constant, or constant but for rounding, spoils the fit of the others."""
    X, Y = planted(500)
    plain = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:])
    for value in (0.0, 1.0, 100.0):
        column = torch.full((500, 3), value) * (1 + 1e-7 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0)))
        fitted = probe.fit_probe(torch.cat([X[:400], column[:400]], 1), Y[:400], torch.cat([X[400:], column[400:]], 1), Y[400:])
        expected = plain(X)
        torch.testing.assert_close(fitted(torch.cat([X, column], 1)), expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_probe_command_is_its_parts(small, tmp_path):
    """Scores are of another split than test, thresholds or strengths are chosen elsewhere than on val, or a set is cut in the wrong place."""
    images = data.ImageFolder(small / "images", 32)
    order, rng = np.random.default_rng(1).permutation(40), np.random.default_rng(0)
    splits = ["train"] * 17 + ["val"] * 14 + ["test"] * 9
    labels = np.array([[i % 2, i % 3 == 0] for i in range(40)])
    root = tmp_path / "images"
    shutil.copytree(small / "images", root, ignore=shutil.ignore_patterns("*.csv"))
    lines = [f"{images.files[i]},{s},{a},{int(b)}" for i, s, (a, b) in zip(order, splits, labels)]
    (root / "attributes.csv").write_text("file,split,a,b\n" + "\n".join(lines[k] for k in rng.permutation(40)) + "\n")
    do("probe", small / "vae/vae.pt", "--data", root, "--json", tmp_path / "a.json", *FP32)
    with torch.no_grad():
        X = vae.load_vae(small / "vae/vae.pt").encode(data.to_float(torch.stack([images[i][0] for i in order]))).mean.flatten(1)
    Y = torch.from_numpy(labels.astype(np.float32))
    fitted = probe.fit_probe(X[:17], Y[:17], X[17:31], Y[17:31])
    expected = probe.scores(Y[31:], fitted(X[31:]), probe.tune_thresholds(Y[17:31], fitted(X[17:31])))
    record = json.loads((tmp_path / "a.json").read_text())
    found = record["results"][str(small / "vae/vae.pt")]
    assert record["n"] == {"train": 17, "val": 14, "test": 9} and found["strength"] == pytest.approx(fitted.strength.tolist())
    for k in ("f1", "f1_tuned", "average_precision", "balanced_accuracy", "f1_micro"):
        assert found[k] == pytest.approx(expected[k], abs=1e-6), k


def test_principal_axes(monkeypatch):
    """Mean, std or axes are not those of the columns, or blocks mix."""
    X = planted(300)[0] @ torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0))).Q
    for block, blocks in ((2048, 1), (5, 2), (4, 5)):  # the largest divisor of 10 up to 4 is 2
        monkeypatch.setattr(probe, "BLOCK", block)
        mean, std, power, axes = probe.principal_axes(X, "cpu")
        assert axes.shape == (blocks, 10 // blocks, 10 // blocks)
        torch.testing.assert_close(mean, X.mean(0)), torch.testing.assert_close(std, X.std(0))
        turned = ((X - mean) / std).view(300, blocks, -1).transpose(0, 1) @ axes
        torch.testing.assert_close(turned.square().mean(1).flatten(), power.flatten(), rtol=1e-3, atol=1e-4)


def test_features_beyond_memory_lie_in_a_file(small, monkeypatch, tmp_path):
    """Large features are held in memory, a row lands in another place, an unreadable image leaves a hole, or a full disk is met late."""
    shutil.copytree(small / "images", tmp_path / "images")
    images = data.ImageFolder(tmp_path / "images", 32)
    order = list(reversed(range(40)))
    whole, rows = probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    assert whole.dtype == torch.float32 and whole.shape == (40, 256) and rows == order
    one = vae.load_vae(small / "vae/vae.pt").encode(data.to_float(images[37][0][None])).mean.flatten()
    torch.testing.assert_close(whole[2], one.detach(), rtol=1e-4, atol=1e-4)
    truncate(tmp_path / "images" / images.files[35])
    images.max_bad = 0.1
    monkeypatch.setattr(probe, "IN_MEMORY", 100)
    stored, rows = probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    assert stored.dtype == torch.float16 and rows == [i for i in order if i != 35]
    torch.testing.assert_close(stored.float(), whole[[i for i in range(40) if i != 4]], rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="TMPDIR"):
        probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    monkeypatch.setattr(probe, "IN_MEMORY", 10 ** 6)
    with pytest.raises(UserError, match="not finite"):
        probe.collect(images, [3], lambda pixels: torch.full((len(pixels), 2), torch.inf), 2, "x")


def test_tokens_and_pixels_are_baselines_of_equal_size(small):
    """The ceiling and the pixel baseline have many more numbers than the latent, or other tokens and pixels."""
    images, vfm = data.ImageFolder(small / "images", 32), mapper.VFM("tf_efficientnet_lite0", 32, 4, LITE0)
    X, rows, side = probe.token_features(vfm, images, [5, 1], 500, torch.device("cpu"))
    assert X.shape == (2, 112 * 4) and side == 2 and rows == [5, 1]
    tokens = vfm(data.to_float(images[1][0][None]))[0]
    torch.testing.assert_close(X[1].view(112, 4)[:, 3], tokens.view(4, 4, 112)[2:, 2:].mean((0, 1)), rtol=1e-4, atol=1e-4)
    X, _, side = probe.pixel_features(images, [5, 1], 200)
    assert side == 8 and X.shape == (2, 192)
    torch.testing.assert_close(X[0].view(3, 8, 8)[:, 0, 1], data.to_float(images[5][0][None])[0, :, :4, 4:8].mean((1, 2)))


def test_average_precision_of_equal_logits():
    """Equal logits are ranked by their place in the file."""
    Y, logits = torch.tensor([[1.0], [1], [0], [0], [0], [1]]), torch.tensor([[2.0], [1], [1], [1], [0], [0]])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        assert probe.average_precision(Y[order], logits[order])[0] == pytest.approx(sklearn.metrics.average_precision_score(Y[:, 0], logits[:, 0]))


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
    draws = probe.bootstrap_f1(Y, {"a": predicted, "b": predicted.clone(), "c": torch.ones_like(predicted)}, draws=50)
    weights = np.random.Generator(np.random.Philox(key=0)).multinomial(200, np.full(200, 1 / 200), 50)
    again = [probe.f1(Y[np.repeat(np.arange(200), w)], predicted[np.repeat(np.arange(200), w)]).mean().item() for w in weights]
    shift = probe.f1(Y, predicted).mean().item() - np.mean(again)
    assert draws["a"].tolist() == pytest.approx(np.add(again, shift), abs=1e-5) and torch.equal(draws["a"], draws["b"])
    assert probe.interval(np.arange(1001)) == pytest.approx((25, 975))
    low, high = probe.interval(draws["a"])
    assert low < probe.f1(Y, predicted).mean() < high and probe.interval(draws["a"] - draws["c"])[0] > 0


def test_gini_by_hand():
    """Gini's coefficient differs from half the mean difference over the mean; the density is another."""
    x = np.random.default_rng(0).gamma(1.0, size=60)
    assert probe.gini(x) == pytest.approx(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))
    assert probe.gini(np.ones(9)) == pytest.approx(0)
    plane = torch.from_numpy(np.random.default_rng(1).normal(size=(80, 2)))
    assert probe.kde_gini(torch.ones(5, 3)) is None
    turned = torch.cat([plane @ torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q, torch.zeros(80, 3)], 1)
    expected = probe.gini(probe.scipy.stats.gaussian_kde(plane.numpy().T)(plane.numpy().T))
    assert probe.kde_gini(turned) == pytest.approx(expected, rel=1e-6)


def test_mixture_is_scikit_learns():
    """The mixture of Gaussians fits worse than scikit-learn's, or its likelihood has another scale."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 3)) * 4
    draw = lambda n: torch.from_numpy(centres[rng.integers(4, size=n)] + rng.normal(size=(n, 3)) @ np.diag([1, 0.5, 0.2]))
    train, test = draw(2000), draw(1000)
    peer = sklearn.mixture.GaussianMixture(4, n_init=5, random_state=0).fit(train.numpy())
    assert probe.gmm_nll(train, test, components=4) == pytest.approx(-peer.score(test.numpy()) / 3, abs=0.01)
    one = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0))
    white, held = probe.whiten(train, test)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(3, dtype=torch.float64))
    assert held.shape == (1000, 3) and probe.whiten(torch.cat([train, train[:, :1]], 1), torch.cat([test, test[:, :1]], 1))[1].shape == (1000, 3)
    gauss = torch.from_numpy(rng.normal(size=(4000, 3)))
    assert probe.gmm_nll(*probe.whiten(5 * gauss[:2000], 5 * gauss[2000:]), components=1) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.03)
    assert probe.gmm_nll(train[:11], test) is None and np.isfinite(probe.gmm_nll(torch.ones(200, 3), torch.ones(5, 3)))
    assert probe.gmm_nll(train, test, components=1) == pytest.approx(-one.log_prob(test).mean().item() / 3, abs=1e-4)


def test_high_frequencies():
    """Smooth latents have power above half the Nyquist frequency, or white noise and stripes have too little."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = lambda f: torch.sin(2 * math.pi * f * x / 16)[None, None]
    assert probe.high_frequency_share(wave(2) + 5) == pytest.approx(0, abs=1e-6) and probe.high_frequency_share(wave(7) + 5) == pytest.approx(1, abs=1e-5)
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

    ramp = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)  # half a cell more is exactly half the difference to the neighbour
    one = torch.ones(1, 1, 1, 1)
    shift, scale = probe.equivariance(Linear(), ramp, Linear().encode(ramp).mean, one)
    assert shift < 1e-8 and scale < 1e-3
    shift, scale = probe.equivariance(Anchored(), ramp, Anchored().encode(ramp).mean, one)
    assert shift > 1e-3


def test_a_part_is_taken_evenly():
    """A part of a sorted table is its beginning, or a row comes twice."""
    assert probe.evenly(slice(10, 15), 9).tolist() == [10, 11, 12, 13, 14] and probe.evenly(slice(0, 1001), 3).tolist() == [0, 500, 1000]
    rows = probe.evenly(slice(7, 160_007), 5000)
    assert len(set(rows.tolist())) == 5000 and rows[0] == 7 and rows[-1] == 160_006


def test_rivals_know_no_scale(small):
    """A rival depends on the scale or shift of the latents, or the class probe runs where the classes of the splits differ."""
    images, model = data.ImageFolder(small / "images", 32), vae.load_vae(small / "vae/vae.pt")
    torch.manual_seed(0)
    order = torch.randperm(40).tolist()
    X, rows = probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    labels, pixels = torch.tensor(images.labels)[rows], torch.stack([images[i][0] for i in rows[:20]])
    part = {"train": slice(0, 20), "val": slice(20, 30), "test": slice(30, 40)}
    found, moved = (probe.rivals(model, x, labels, part, pixels, "cpu") for x in (X, 100 * X + 7))
    for name in ("kde_gini", "gmm_nll", "high_frequency_share"):
        assert found[name] == pytest.approx(moved[name], rel=1e-3)
    with torch.no_grad():
        assert found["psnr"] == pytest.approx(fid.psnr(pixels, data.to_uint8(model.decode(model.encode(data.to_float(pixels)).mean))).mean().item(), abs=1e-3)
    X = torch.cat([X[:, :3], 5 * labels[:, None] + torch.randn(40, 1)], 1)
    assert probe.class_accuracy(X, labels, part, "cpu") >= 0.9
    assert probe.class_accuracy(X, torch.zeros(40, dtype=torch.long), part, "cpu") is None
    assert probe.class_accuracy(X, torch.where(torch.arange(40) < 30, labels, 2), part, "cpu") is None


def test_correlations():
    """Pearson, Spearman or the partial correlation differ from their definitions, or a score that only follows PSNR is praised."""
    rng = np.random.default_rng(0)
    quality = rng.normal(size=40)
    real, copy_ = rng.normal(size=40), quality + 0.05 * rng.normal(size=40)
    fd = 2 * quality - real + 0.1 * rng.normal(size=40)
    rows = [dict(name=str(i), psnr=q, fd=f, real=r, copied=c, some=1.0) for i, (q, f, r, c) in enumerate(zip(quality, fd, real, copy_))]
    del rows[7]["some"]
    result = probe.correlate(rows, draws=300)
    stats = probe.scipy.stats
    assert set(result) == {"psnr", "real", "copied"}
    for name, x in (("psnr", quality), ("real", real), ("copied", copy_)):
        assert result[name]["pearson"] == pytest.approx(stats.pearsonr(x, fd)[0]) and result[name]["spearman"] == pytest.approx(stats.spearmanr(x, fd)[0])
    r = np.corrcoef([real, fd, quality])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert result["real"]["partial"] == pytest.approx(expected)
    assert probe.verdict(result["real"]) == "follows the distance beyond PSNR (higher is better)" and probe.verdict(result["copied"]).startswith("undecided")
    assert abs(result["copied"]["pearson"]) > 0.8
    few = probe.correlate([dict(r, run=str(i % 7)) for i, r in enumerate(rows)], draws=50)
    assert few["real"]["runs"] == 7 and few["real"]["n"] == 40 and probe.verdict(few["real"]).startswith("undecided: 7 runs")
    arms = probe.correlate([dict(r, arm="ab"[i % 2]) for i, r in enumerate(rows)], draws=50)["real"]
    assert arms["runs"] == 40 and probe.verdict(arms).startswith("undecided: 2 kinds of VAE")
    flat = probe.correlate([dict(r, flat=1.0) for r in rows], draws=50)["flat"]
    assert flat["pearson"] is None and flat["pearson_interval"] is None and flat["partial"] is None
    assert np.isnan(probe.partial_correlation(quality, fd, quality)) and np.isnan(probe.correlation(np.ones(5), fd[:5]))


def test_arms_of_a_run_are_drawn_together():
    """The interval treats the arms of one run as independent."""
    rows = [dict(name=f"{run}{arm}", run=run, psnr=20.0 + i, fd=100.0 - 10 * i - arm, score=i + 0.1 * arm) for i, run in enumerate("abcdefghij") for arm in (0, 1)]
    apart = probe.correlate([dict(r, run=r["name"]) for r in rows], draws=400)
    assert apart["score"]["runs"] == 20 and probe.correlate(rows, draws=9)["score"]["runs"] == 10
    double = [dict(r, fd=[3.0, 1, 2, 9, 4, 8, 5, 6, 7, 0][i // 2]) for i, r in enumerate(rows)]
    width = lambda rows: float(np.diff(probe.correlate(rows, draws=400)["psnr"]["pearson_interval"])[0])
    assert width(double) > 1.2 * width([dict(r, run=r["name"]) for r in double])  # copies bring no certainty


def test_scatter(tmp_path):
    """A point lies in the wrong place, or has another colour than its kind of VAE in the legend."""
    rows = [dict(name=str(i), arm="ab"[i % 2], psnr=float(i), fd=[0.0, 10, 5, 7][i], score=float(-i)) for i in range(4)]
    figure = probe.scatter_figure(rows, probe.correlate(rows, draws=20))
    psnr, score, legend, empty = figure.axes
    for axis, sign in ((psnr, 1), (score, -1)):
        dots, discs = axis.lines[::2], axis.lines[1::2]
        assert [line.get_xydata().tolist() for line in dots] == [[[0, 0], [sign * 2, 5]], [[sign * 1, 10], [sign * 3, 7]]]
        assert [line.get_xydata().tolist() for line in discs] == [[[sign * 1, 2.5]], [[sign * 2, 8.5]]]
        assert [line.get_color() for line in dots] == [line.get_color() for line in discs] == [handle.get_color() for handle in legend.get_legend().legend_handles]
    assert dots[0].get_color() != dots[1].get_color() and [t.get_text() for t in legend.get_legend().get_texts()] == ["a", "b"] and not empty.lines
    probe.save_figure(figure, tmp_path / "s.png")
    assert len(Image.open(tmp_path / "s.png").convert("RGB").getcolors(10 ** 6)) > 20
    colours = probe.kind_colours(["control", "send", *"abcdefghijklmn"])
    assert len(set(colours.values())) == 16 and colours["control"] == "black"


def test_correlate_command(demo, tmp_path):
    """The command claims what the paper's four rows cannot show, misreads runs, or mixes distances."""
    out = do("probe", "correlate", "--paper", "--png", tmp_path / "s.png", "--json", tmp_path / "s.json")
    result = json.loads((tmp_path / "s.json").read_text())["correlations"]
    assert result["psnr"]["pearson"] == pytest.approx(0.99, abs=0.015) and "not told apart" in out and out.count("undecided") == 3
    assert Image.open(tmp_path / "s.png").width > 800

    def make(i, network="net@96"):
        (tmp_path / f"run{i}").mkdir(exist_ok=True)
        (tmp_path / f"run{i}/report.json").write_text(json.dumps({"network": network, "arms": {a: dict(psnr=20.0 + i, fd=100.0 - i - j, fd_n=5, probe_f1=0.5 + 0.1 * i * j, seconds={})
                                                                                            for j, a in enumerate(("control", "send"))}}))
        return tmp_path / f"run{i}"

    runs = [make(i) for i in range(3)]
    out = do("probe", "correlate", *runs)
    assert "n = 6" in out and "undecided: 2 kinds of VAE" in out
    rows = [r for run in runs for r in probe.read_run(run)]
    assert [(r["fd"], r["probe_f1"], r["run"]) for r in rows[2:4]] == [(99.0, 0.5, str(runs[1])), (98.0, 0.6, str(runs[1]))]
    arms = probe.read_run(demo)
    assert [r["name"] for r in arms] == [f"{demo}/control", f"{demo}/send"] and {"psnr", "fd", "probe_f1", "probe_average_precision", "probe_top5_recall"} <= arms[0].keys()
    for i, model in enumerate(("SiT-B-1", "SiT-XL-1")):
        (tmp_path / f"arm/{model}").mkdir(parents=True)
        (tmp_path / f"arm/{model}/samples.npz.json").write_text(json.dumps(dict(fd={"a": 5.0 + i}, n={"a": 50000}, network="inception")))
    (tmp_path / "arm/recon.json").write_text('{"psnr": 28.0}')
    (tmp_path / "arm/probe.json").write_text(json.dumps({"results": {"a/vae.pt": dict(f1=0.6, seconds=3.0, per_attribute={}), "majority": dict(f1=0.1)}}))
    assert [(r["fd"], r["psnr"], r["probe_f1"]) for r in probe.read_run(tmp_path / "arm")] == [(5.0, 28.0, 0.6), (6.0, 28.0, 0.6)]
    assert [r["fd"] for r in probe.read_run(tmp_path / "arm/SiT-XL-1")] == [6.0]
    (tmp_path / "bad.json").write_text('[{"name": "a", "fd": 1}]')
    (tmp_path / "text.json").write_text("{")
    assert probe.read_run(runs[0] / "report.json") == rows[:2]
    report = json.loads((runs[1] / "report.json").read_text())
    report["arms"]["send"].pop("probe_f1")
    (tmp_path / "less").mkdir(), (tmp_path / "less/report.json").write_text(json.dumps(report))
    assert "left out, not in every row: probe_f1" in do("probe", "correlate", runs[0], tmp_path / "less")
    (tmp_path / "nan.json").write_text('[{"name": "a", "fd": NaN, "psnr": 1.0}]')
    other = make(3, "inception")
    for words, found in (((tmp_path / "bad.json",), ["a has no psnr"]), ((tmp_path / "none",), ["none"]), ((), ["--paper"]), (("--paper", runs[0]), ["--paper"]), ((tmp_path / "nan.json",), ["a has no fd"]), ((*runs, "--png", tmp_path / "x.txt"), [".png"]), ((*runs, "--json", tmp_path), ["is a folder"]), ((tmp_path / "text.json",), ["text.json"]),
                         ((*runs, other), ["do not mix", "inception", "net@96"]), ((tmp_path / "arm",), ["do not mix", "SiT-XL-1"]), ((runs[0],), ["2 rows"]), ((runs[0], *runs), ["twice"]), ((tmp_path,), ["report.json"])):
        assert_refused(call("probe", "correlate", *words), *found)


def test_directions():
    """A step does not raise its attribute's logit as asked, or reached and leak are not those of a VAE that shows all or nothing."""
    class Transparent:  # pictures are latents, to 8 bits
        def decode(self, z):
            return z

        def encode(self, x):
            return SimpleNamespace(mean=x)

    class Half(Transparent):
        def decode(self, z):
            return 0.5 * z

    class Blind(Transparent):
        def decode(self, z):
            return torch.zeros_like(z)

    torch.manual_seed(0)
    z = 0.1 * torch.randn(50, 3, 4, 4)
    square = probe.Probe(torch.linalg.qr(torch.randn(48, 3)).Q, torch.zeros(3), torch.zeros(3), torch.zeros(48))
    spread = square(z.flatten(1)).std(0)
    moved = data.to_float(probe.move(Transparent(), square, z, 1, 0.3)).flatten(1)
    change = square(moved) - square(z.flatten(1))
    torch.testing.assert_close(change.mean(0), torch.tensor([0, 0.3, 0]), rtol=0, atol=3e-3)
    reached, leak = probe.disentanglement(Transparent(), square, z, spread)
    assert reached.tolist() == pytest.approx([1, 1, 1], abs=0.02) and leak.max() < 0.02  # orthogonal directions
    mixed = probe.Probe(square.weight @ torch.tensor([[1.0, 0.6, 0], [0, 0.8, 0], [0, 0, 1]]), torch.zeros(3), torch.zeros(3), torch.zeros(48))
    spread = mixed(z.flatten(1)).std(0)
    reached, leak = probe.disentanglement(Transparent(), mixed, z, spread)
    assert leak[0] == pytest.approx(0.6 * (spread[0] / spread[1]).item() / 2, abs=0.02) and leak[2] < 0.02
    half, same = probe.disentanglement(Half(), mixed, z, spread)
    assert half.tolist() == pytest.approx([0.5] * 3, abs=0.02) and same.tolist() == pytest.approx(leak.tolist(), abs=0.02)
    reached, _ = probe.disentanglement(Blind(), mixed, z, spread)
    assert reached.tolist() == [0, 0, 0]


def test_what_the_probe_saw_is_drawn(small, tmp_path):
    """Pictures lie in another order than down, as it is, up; or under another VAE or attribute."""
    images = data.ImageFolder(small / "images", 32)
    model, pixels = vae.load_vae(small / "vae/vae.pt"), torch.stack([images[i][0] for i in range(5)])
    torch.manual_seed(0)
    fitted, spread = probe.Probe(torch.randn(256, 3), torch.zeros(3), torch.zeros(3), torch.zeros(256)), torch.tensor([1.0, 2, 3])
    _, _, pictures = probe.see(model, fitted, pixels, spread, [2, 0])
    assert pictures.shape == (2, 4, 3, 3, 32, 32)
    with torch.no_grad():
        z, w = model.encode(data.to_float(pixels)).mean[:4], fitted.weight[:, 2]
        up = data.to_uint8(model.decode(z + (probe.REACH * 3 * w / (w @ w)).view(1, 4, 8, 8)))
        assert torch.equal(pictures[1, :, 1], data.to_uint8(model.decode(z)))
    assert (pictures[0, :, 2].int() - up.int()).abs().max() <= 1 and not torch.equal(pictures[0, :, 0], pictures[0, :, 2])
    probe.draw_directions(tmp_path / "s.png", {"a": (["x", "y"], pictures), "b": (["x", "y"], 255 - pictures)})
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert np.array_equal(sheet[18:50, 150 + 64:150 + 96], pictures[0, 0, 2].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[18 + 38:18 + 38 + 32, 150 + 102:150 + 134], pictures[1, 1, 0].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[94 + 18:94 + 50, 150:182], 255 - pictures[0, 0, 0].permute(1, 2, 0).numpy())


def attribute_folders(root):
    """Tiny copies of CelebA, DeepFashion and AwA2 as they are distributed."""
    celeba, fashion, awa = root / "celeba", root / "fashion", root / "awa2"
    write_images(celeba / "img_align_celeba", 12, size=40, classes=("",))
    files = data.find_images(celeba / "img_align_celeba")
    (celeba / "list_attr_celeba.txt").write_text(f"{len(files)}\nSmiling Young \n" + "".join(f"{f}  {1 if i % 2 else -1} {1 if i % 3 else -1}\n" for i, f in enumerate(files)))
    (celeba / "list_eval_partition.txt").write_text("".join(f"{f} {i // 4 % 3}\n" for i, f in enumerate(files)))
    write_images(fashion / "Img/img", 18, size=40, classes=("Tee", "Sheer_Blouse"))
    files = [f"img/{f}" for f in data.find_images(fashion / "Img/img")]
    for name, attributes in (("Anno_coarse", ["a-line", "abstract chevron print", "lace"]), ("Anno_fine", ["floral", "cotton"])):
        (fashion / name).mkdir()
        (fashion / name / "list_attr_cloth.txt").write_text(f"{len(attributes)}\nattribute_name  attribute_type\n" + "".join(f"{a}   {i}\n" for i, a in enumerate(attributes)))
    (fashion / "Anno_coarse/list_attr_img.txt").write_text(f"{len(files)}\nimage_name  attribute_labels\n" + "".join(f"{f}   {1 if i % 2 else -1} {0 if i % 5 else 1} -1\n" for i, f in enumerate(files)))
    (fashion / "Eval").mkdir()
    (fashion / "Eval/list_eval_partition.txt").write_text(f"{len(files)}\nimage_name  evaluation_status\n" + "".join(f"{f}  {data.SPLITS[i % 3]}\n" for i, f in enumerate(files)))
    for k, split in enumerate(data.SPLITS):
        (fashion / f"Anno_fine/{split}.txt").write_text("".join(f"{f}\n" for f in files[k::3]))
        (fashion / f"Anno_fine/{split}_attr.txt").write_text("".join(f"{i % 2} {int(i > 2)} \n" for i in range(len(files[k::3]))))
    write_images(awa / "JPEGImages", 36, size=40, classes=("antelope", "grizzly+bear", "rat"))
    (awa / "classes.txt").write_text("     1\tantelope\n     2\tgrizzly+bear\n     3\trat\n")
    (awa / "predicates.txt").write_text("    1\tblack\n    2\tbig\n")
    (awa / "predicate-matrix-binary.txt").write_text("0 1\n1 1\n1 0\n")
    (awa / "trainclasses.txt").write_text("antelope\nrat\n"), (awa / "testclasses.txt").write_text("grizzly+bear\n")
    return celeba, fashion, awa


def test_attribute_tables_of_others(tmp_path):
    """CelebA's, DeepFashion's or AwA2's files are read with other images, splits, names or values."""
    celeba, fashion, awa = attribute_folders(tmp_path)
    with pytest.raises(UserError, match="Anno_fine"):
        data.load_attributes(fashion)
    root, table = data.load_attributes(celeba)
    assert root == celeba / "img_align_celeba" and table.names == ["Smiling", "Young"] and table.splits == ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    assert table.values[:4].tolist() == [[0, 0], [1, 1], [0, 1], [1, 0]]
    root, table = data.load_attributes(fashion / "Anno_coarse")
    assert root == fashion / "Img/img" and table.names == ["a-line", "abstract chevron print", "lace"] and set(table.files) == set(data.find_images(root))
    assert table.splits[:4] == ["train", "val", "test", "train"] and np.isnan(table.values[1, 1]) and table.values[:3, 0].tolist() == [0, 1, 0]
    _, table = data.load_attributes(fashion / "Anno_fine")
    assert table.names == ["floral", "cotton"] and table.splits == ["train"] * 6 + ["val"] * 6 + ["test"] * 6 and table.values[3].tolist() == [1, 1]
    root, table = data.load_attributes(awa)
    by = {f: (s, v.tolist()) for f, s, v in zip(table.files, table.splits, table.values)}
    assert {v for f, (s, v2) in by.items() if f.startswith("grizzly") for v in [s]} == {"test"} and by[min(f for f in by if f.startswith("rat"))] == ("train", [1, 0])
    assert sum(s == "val" for s, _ in by.values()) == 2 and all(v == [0, 1] for f, (_, v) in by.items() if f.startswith("antelope"))


@pytest.mark.parametrize("file,old,new,words", [
    ("celeba/list_attr_celeba.txt", "12\n", "13\n", ["13", "12 rows"]), ("celeba/list_attr_celeba.txt", "000.png  -1 -1", "000.png  -1", ["000.png", "1 labels", "2"]),
    ("celeba/list_attr_celeba.txt", "000.png  -1 -1", "000.png  -1 7", ["'7'"]), ("celeba/list_eval_partition.txt", "003.png 0", "003.png 5", ["003.png", "split 5"]),
    ("celeba/list_eval_partition.txt", "003.png 0\n", "", ["11 lines", "12"]), ("celeba/list_attr_celeba.txt", "001.png  1", "999.png  1", ["999.png"]),
    ("celeba/list_eval_partition.txt", "005.png 1", "003.png 1", ["003.png", "two splits"]), ("celeba/list_eval_partition.txt", "005.png 1", "005.png", ["005.png", "split missing"]),
    ("celeba/list_eval_partition.txt", "", None, ["list_eval_partition.txt", "No such file", "README"]),
    ("fashion/Anno_coarse/list_attr_cloth.txt", "3\nattr", "4\nattr", ["list_attr_cloth", "4"]), ("fashion/Eval/list_eval_partition.txt", "train", "dev", ["the split dev"]),
    ("fashion/Anno_fine/train_attr.txt", "0 0", "0 2", ["train_attr"]), ("fashion/Anno_fine/val.txt", "img/Sheer_Blouse/003.png", "img/Sheer_Blouse/001.png", ["train and val"]),
    ("fashion/Anno_fine/test_attr.txt", "0 0", "0", ["test_attr", "1 labels"]), ("fashion/Anno_fine/test.txt", "img/Sheer_Blouse/005.png", "img/none.png", ["none.png", "no image below"]),
    ("awa2/classes.txt", "     3\trat\n", "", ["3 lines", "2"]), ("awa2/predicates.txt", "    2\tbig\n", "", ["2 values", "expected 1"]), ("awa2/trainclasses.txt", "rat\n", "dog\n", ["dog", "classes.txt"]),
    ("awa2/testclasses.txt", "grizzly+bear\n", "rat\n", ["rat", "two splits"]), ("awa2/trainclasses.txt", "rat\n", "", ["no attribute has both values"])])
def test_bad_tables_of_others(file, old, new, words, small, tmp_path):
    """A cut, inconsistent or overlapping table is used, or ends in a traceback."""
    attribute_folders(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new or "", 1) if old != "train" else text.replace(old, new))
    if new is None:
        (tmp_path / file).unlink()
    root = tmp_path / "/".join(file.split("/")[:2 if "Anno" in file else 1])
    if "Eval" in file:
        root = tmp_path / "fashion/Anno_coarse"
    assert_refused(call("probe", small / "vae/vae.pt", "--data", root, "--dry-run"), *words)


def test_probe_of_celeba(small, tmp_path):
    """The whole command on a foreign layout: table, rivals, pictures, ceiling, interval and differences."""
    celeba, _, awa = attribute_folders(tmp_path)
    common = ("probe", small / "vae/vae.pt", small / "other/vae.pt", "--data", celeba, "--resolution", 32)
    out = do(*common, "--png", tmp_path / "seen.png", "--show", "Young", "--rivals", *VFM, "--grid", 2, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    result = json.loads((tmp_path / "a.json").read_text())["results"]
    first = result[str(small / "vae/vae.pt")]
    assert "top5_recall" not in first  # of two attributes it is always 1
    assert {"f1", "kde_gini", "high_frequency_share", "shift_error", "scale_error", "psnr", "f1_interval", "reached", "leak"} <= first.keys()
    assert "class_accuracy" not in first  # one class
    assert result["tf_efficientnet_lite0 1 x 1"]["dimension"] == 112 and "minus" in out and ("within chance" in out or "beyond" in out)
    assert Image.open(tmp_path / "seen.png").size == (150 + 4 * 102, 2 * (18 + 38))
    rows = list(csv.DictReader(open(tmp_path / "a.csv")))
    assert [r["attribute"] for r in rows] == ["Smiling", "Young"] and float(rows[0][f"{small}/vae/vae.pt f1"]) == pytest.approx(first["per_attribute"]["f1"][0], abs=1e-4)
    assert [float(r["share"]) for r in rows] == [0.5, 0.75]
    assert_refused(call(*common, "--png", tmp_path / "a.png", "--show", "Hat"), "--show Hat", "Smiling")
    assert_refused(call(*common, "--show", "Young"), "--show", "without --png"), assert_refused(call(*common, "--grid", 4), "--grid", "without --vfm")
    assert_refused(call(*common, "--png", tmp_path / "picture"), ".png"), assert_refused(call(*common, "--csv", tmp_path), "is a folder")
    assert "enlarged to 64 pixels, the median short side is 40" in do(*common[:-1], 64, "--dry-run")
    assert_refused(call(*common[:-1], 36, "--rivals"), "--resolution 36", "multiple of 8")
    assert_refused(call(*common, "--vfm", "no_such_model"), "no_such_model")
    assert_refused(call("probe", small / "vae/vae.pt", small / "vae/vae.pt", "--data", celeba), "twice")
    for name, folder in (("list_attr_celeba.txt", "Anno"), ("list_eval_partition.txt", "Eval"), ("img_align_celeba", "Img")):  # as the owners' folders are
        (celeba / folder).mkdir()
        (celeba / name).rename(celeba / folder / name)
    assert "2 attributes, 12 images" in do(*common, "--dry-run") and "not of images" in call("probe", small / "vae/vae.pt", "--data", awa, "--dry-run")[1]
