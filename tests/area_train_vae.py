from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# train_vae.py

@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """VGG16's layers with random weights (no network), saved as torchvision saves them: (layers, file)."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for m in layers:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight), nn.init.normal_(m.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**{f"features.{k}": v for k, v in layers.state_dict().items()}, "classifier.0.bias": torch.zeros(4096)}, path)
    return layers, path


def test_lpips_is_the_packages(vgg, monkeypatch):
    """LPIPS from a local VGG16 file differs from the lpips package with that backbone."""
    layers, path = vgg
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda **_: SimpleNamespace(features=copy.deepcopy(layers)))
    peer = lpips.LPIPS(net="vgg", verbose=False).eval()
    monkeypatch.undo()
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    ours = train_vae.build_lpips(path, torch.device("cpu"))
    with torch.no_grad():
        assert (peer(x, y) > 0.01).all()
        torch.testing.assert_close(ours(x, y), peer(x, y))
    assert not any(p.requires_grad for p in ours.parameters())


def test_lpips_needs_a_whole_file(vgg, tmp_path):
    """A VGG16 file that lacks a layer leaves random weights in the metric."""
    state = torch.load(vgg[1])
    state.pop("features.28.weight")
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="torn.pth.*28.weight is missing"):
        train_vae.build_lpips(tmp_path / "torn.pth", torch.device("cpu"))


def test_hinge_loss_by_hand():
    """The discriminator's loss differs from half of mean relu(1 - D(x)) + mean relu(1 + D(x_rec))."""
    loss = train_vae.DiscriminatorLoss(nn.Identity())
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + (0 + 1 + 2) / 3))
    assert train_vae.PatchGAN()(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def trainer(folder, *flags):
    """A Trainer of the demo's VAE at 32 x 32, batch 4, and its first batch."""
    argv = sys.argv
    preset = [] if "--init" in flags else ["--preset", "demo"]
    sys.argv = ["train_vae.py", "--data", str(folder), "--out", str(folder / "out"), *preset, "--resolution", "32", "--batch", "4", "--lpips", "0", "--gan", "0", "--lambda-align", "0", "--precision", "fp32", "--compile", "0", *map(str, flags)]
    try:
        args = train_vae.parse_args()
    finally:
        sys.argv = argv
    t = train_vae.Trainer(args, torch.device("cpu"), 0, 1)
    t.parallel()
    return t, torch.stack([data.ImageFolder(folder, 32)[i][0] for i in range(4)])


TABLE = {"rec": "encoder decoder", "lpips": "encoder decoder", "kl": "encoder", "gan": "encoder decoder discriminator",
         "align": "encoder mapper", "vavae": "encoder mapper", "warmup": "mapper", "disc": "discriminator"}  # L_disc always runs beside L_GAN


@pytest.mark.parametrize("which", TABLE)
def test_gradient_flow(which, vgg, tmp_path, monkeypatch):
    """A loss moves other modules than the table at the head of train_vae.py says."""
    monkeypatch.setattr(train_vae, "gradient_ratio", lambda *_, **__: torch.tensor(1.0))  # the likelihood, which it compares with, is off
    flags = {"lpips": ("--lpips", 1, "--lpips-ckpt", vgg[1]), "gan": ("--gan", 1), "disc": ("--gan", 1),
             "align": ("--lambda-align", 1, *VFM), "vavae": ("--lambda-align", 1, "--align", "vavae", *VFM), "warmup": ("--lambda-align", 1, *VFM, "--mapper-warmup", 1)}
    t, pixels = trainer(write_images(tmp_path, 4), *flags.get(which, ()))
    t.loss.weights = {k: float(k == which.replace("warmup", "align").replace("vavae", "align")) for k in t.loss.weights}
    parts = dict(encoder=[t.vae.encoder, t.vae.quant_conv], decoder=[t.vae.decoder, t.vae.post_quant_conv], mapper=[t.mapper],
                 discriminator=[t.discriminator], vfm=[t.vfm], lpips=[t.lpips])
    parts = {k: nn.ModuleList(v) for k, v in parts.items() if v[0] is not None}
    before = {k: common.weights_hash(m.state_dict()) for k, m in parts.items()}
    t.train_step(pixels, t.draw(t.step), None)
    assert {k for k, m in parts.items() if common.weights_hash(m.state_dict()) != before[k]} == set(TABLE[which].split())


def test_standardised_tokens(tmp_path):
    """--vfm-standardise measures over other axes or images, is left out of the loss, or depends on the cache."""
    images, losses = write_images(tmp_path / "images", 12), {}
    t, pixels = trainer(images, "--lambda-align", 1, *VFM, "--vfm-standardise", 1)
    folder = data.ImageFolder(images, 32, flip=True)
    t.measure_tokens(folder)
    known = t.vfm(data.to_float(torch.stack([folder[i][0] for i in range(12)]))).flatten(0, 1)
    (_, _, target, _), = t.micro_batches(pixels, t.draw(0), None)
    torch.testing.assert_close(target, (t.vfm(data.to_float(pixels)) - known.mean(0)) / known.std(0), rtol=1e-3, atol=1e-3)
    command = ("--data", images, "--preset", "demo", "--resolution", 32, "--batch", 4, "--lr", 1e-4, "--lpips", 0, "--gan", 0, "--steps", 2, "--log-every", 1, *VFM, *FP32)
    for name, more in dict(plain=(), standardised=("--vfm-standardise", 1), cached=("--vfm-standardise", 1, "--cache-vfm", tmp_path / "tokens")).items():
        do("train_vae", *command, *more, "--out", tmp_path / name)
        losses[name] = [r["align"] for r in metrics(tmp_path / name)[1]]
    assert losses["standardised"] == pytest.approx(losses["cached"], abs=1e-3) and abs(losses["plain"][0] - losses["standardised"][0]) > 1e-4
    assert_refused(call("train_vae", "--data", images, "--preset", "demo", "--out", tmp_path / "x", "--vfm-standardise", 1, "--align", "vavae"), "--vfm-standardise", "--align send")


@pytest.mark.parametrize("rec", ["l1", "mse"])
def test_losses_by_hand(rec, vgg, tmp_path):
    """A part of equation (3) is scaled, has another noise or target, or the gradient is not the weighted sum's."""
    t, pixels = trainer(write_images(tmp_path, 4), "--rec", rec, "--kl", 1e-3, "--gan", 0.1, "--lpips", 0.5, "--lpips-ckpt", vgg[1],
                        "--lambda-align", 2, *VFM, "--seed", 3)
    x = data.to_float(pixels)
    a, eps, eps_align = data.draw_noise(3, range(4), 1, (4, 8, 8), (4, 8, 8))
    q = t.vae.encode(x)
    z = q.sample(eps)
    x_rec = t.vae.decode(z)
    mean, std = z.detach().mean((0, 2, 3), keepdim=True), (z.detach().var((0, 2, 3), unbiased=False, keepdim=True) + 1e-4).sqrt()
    z_t = mapper.add_noise((z - mean) / std, a=a[:, 0], eps=eps_align)
    expected = dict(rec=(x_rec - x).abs().mean() if rec == "l1" else (x_rec - x).square().mean(), kl=q.kl(), lpips=t.lpips(x_rec, x).mean(),
                    gan=-t.discriminator(x_rec).mean(), align=mapper.align_loss(t.mapper(z_t), t.vfm(x)))
    disc = (F.relu(1 - t.discriminator(x)).mean() + F.relu(1 + t.discriminator(x_rec)).mean()) / 2
    weights = dict(rec=1, kl=1e-3, lpips=0.5, gan=0.1, align=2)
    total, norm = sum(w * expected[k] for k, w in weights.items()), lambda gs: torch.cat([g.double().flatten() for g in gs]).norm()
    by_vae, by_mapper = (torch.autograd.grad(total, m.parameters(), retain_graph=True) for m in (t.vae, t.mapper))
    by_disc = torch.autograd.grad(disc, t.discriminator.parameters())
    expected.update(disc=disc, grad_norm=norm(by_vae), mapper_grad_norm=norm(by_mapper), disc_grad_norm=norm(by_disc))
    t.args.micro_batch = 3
    parts = t.train_step(pixels, t.draw(t.step), None)
    assert parts.keys() == expected.keys()
    for k, v in expected.items():
        assert parts[k].item() == pytest.approx(v.item(), rel=5e-4 if "norm" in k else 1e-4, abs=1e-6), k


def test_patchgan_is_tamings(tmp_path):
    """Names or logits differ from taming's NLayerDiscriminator, so that a pre-trained one does not load or judges otherwise."""
    torch.manual_seed(0)
    layers, width = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2, True)], 64
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2, True)]
        width *= 2
    peer = nn.ModuleDict({"main": nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))})
    for m in peer["main"]:
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.3), nn.init.normal_(m.bias), m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    x, files = torch.randn(2, 3, 64, 64), {"bare": peer.state_dict(), "ldm": {"state_dict": {f"loss.discriminator.{k}": v for k, v in peer.state_dict().items()}}}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
        ours = train_vae.PatchGAN()
        train_vae.load_discriminator(ours, tmp_path / name)
        for mode in (False, True):  # the statistics of the file, then those of the batch
            torch.testing.assert_close(ours.train(mode)(x), copy.deepcopy(peer)["main"].train(mode)(x), rtol=1e-4, atol=1e-4)
    torch.save({"main.0.weight": torch.zeros(64, 3, 4, 4)}, tmp_path / "part")
    torch.save({"a": torch.zeros(1)}, tmp_path / "none")
    for name, words in (("part", "main.0.bias is missing"), ("none", "no discriminator"), ("gone", "no such")):
        with pytest.raises(UserError, match=words):
            train_vae.load_discriminator(train_vae.PatchGAN(), tmp_path / name)


def test_gradient_ratio():
    """LDM's adaptive weight is another ratio of gradients, or is not limited."""
    reference, loss = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 2.0])
    assert train_vae.gradient_ratio(reference, loss, 1e4).item() == pytest.approx(18 ** 0.5 / (5 ** 0.5 + 1e-4))
    assert train_vae.gradient_ratio(reference, 0 * loss, 1e4).item() == pytest.approx(1e4)


@pytest.mark.parametrize("which", ["gan", "vavae"])
def test_adaptive_weights_by_hand(which, tmp_path):
    """The GAN (LDM) or VA-VAE's alignment is weighed by other gradients than those of the likelihood in the last layers."""
    flags = {"gan": ("--gan", 0.1, "--gan-adaptive", 1), "vavae": ("--align", "vavae", *VFM)}[which]
    t, pixels = trainer(write_images(tmp_path, 4), *flags, "--lambda-align", 0.1 if which == "vavae" else 0)
    assert t.args.align == ("vavae" if which == "vavae" else "none")
    x, eps = data.to_float(pixels), data.draw_noise(0, range(4), 1, (4, 8, 8))[1]
    z = t.vae.encode(x).sample(eps)
    rec = (t.vae.decode(z) - x).abs().mean()
    part = -t.discriminator(t.vae.decode(z)).mean() if which == "gan" else mapper.vavae_loss(t.mapper(z), t.vfm(x))
    last = {"gan": t.vae.decoder, "vavae": t.vae.encoder}[which].conv_out.weight
    a, b = (torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (rec, part))
    ratio = (a / (b + 1e-4)).detach()
    gradients = torch.autograd.grad(rec + 1e-6 * t.vae.encode(x).kl() + 0.1 * ratio * part, t.vae.parameters())
    parts = t.train_step(pixels, t.draw(t.step), None)
    name = {"gan": "gan", "vavae": "align"}[which]
    assert parts[f"{name}_ratio"].item() == pytest.approx(ratio.item(), rel=1e-3) and parts[name].item() == pytest.approx(part.item(), rel=1e-4)
    assert parts["grad_norm"].item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-3)


def test_align_flag(tmp_path):
    """--align none is not lambda 0, or an arm has another default weight."""
    for flags, align, weight in (((), "send", 1.0), (("--align", "vavae"), "vavae", 0.1), (("--align", "none"), "none", 0.0), (("--lambda-align", 0), "none", 0.0)):
        argv, sys.argv = sys.argv, ["train_vae.py", "--data", "a", "--out", "b", *map(str, flags)]
        try:
            args = train_vae.parse_args()
        finally:
            sys.argv = argv
        assert (args.align, args.lambda_align) == (align, weight)


def test_latent_stats():
    """The mapper's input is normalised with other statistics than the batch's, or they depend on its split."""
    z = torch.randn(8, 4, 3, 3) * torch.tensor([1.0, 2.0, 3.0, 0.5]).view(1, 4, 1, 1) + 5
    stats = train_vae.LatentStats(4, torch.device("cpu"))
    for part in z.split(3):
        stats.add(part)
    stats.update(momentum=1.0)
    torch.testing.assert_close(stats.normalise(z), F.batch_norm(z, None, None, training=True, eps=1e-4), rtol=1e-4, atol=1e-5)
    mean, var = stats.mean.clone(), stats.var.clone()
    stats.add(2 * z)
    stats.update(momentum=0.1)
    torch.testing.assert_close(stats.mean, 1.1 * mean)
    torch.testing.assert_close(stats.var, 1.3 * var)


def test_latent_stats_gradient():
    """The gradient through the normalisation is not batch norm's, so that scaling z up evades the noise of eq. (1)."""
    z, target = torch.randn(8, 4, 3, 3, requires_grad=True), torch.randn(8, 4, 3, 3)
    expected, = torch.autograd.grad((F.batch_norm(z, None, None, training=True, eps=1e-4) * target).sum(), z)
    stats = train_vae.LatentStats(4, torch.device("cpu"))
    for _ in range(3):  # statistics, then those of the gradient, then the gradient with both
        gradients = []
        for part, weight in zip(z.detach().split(3), target.split(3)):
            part.requires_grad_(True)
            gradients += torch.autograd.grad((stats.normalise(part) * weight).sum(), part)
            stats.add(part.detach())
        stats.update(momentum=1.0)
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-3, atol=1e-4)


def test_learning_rate():
    """Warm-up or decay misses its ends."""
    args = SimpleNamespace(lr=0.1, lr_warmup=4, lr_decay=1, steps=100)
    assert common.learning_rate(args, 0) == pytest.approx(0.025)
    assert common.learning_rate(args, 50) == pytest.approx(0.05)
    assert common.learning_rate(args, 100) == pytest.approx(0)
    args.lr_decay = 0
    assert common.learning_rate(args, 99) == 0.1
