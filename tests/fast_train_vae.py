from helpers import *  # noqa: F403

# ---------------------------------------------------------------------------------------------------------
# train_vae.py


def test_lpips_is_the_packages(vgg, monkeypatch, tmp_path):
    """LPIPS from a local VGG16 file differs from the lpips package with that backbone, or a torn file leaves
    random weights."""
    layers, path = vgg
    backbone = lambda **_: SimpleNamespace(features=copy.deepcopy(layers))
    with monkeypatch.context() as m:
        m.setattr(lpips.pretrained_networks.tv, "vgg16", backbone)
        peer = lpips.LPIPS(net="vgg", verbose=False).eval()
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    ours = fid.build_lpips(path, torch.device("cpu"))
    with torch.no_grad():
        assert (peer(x, y) > 0.01).all()
        torch.testing.assert_close(ours(x, y), peer(x, y))
    assert not any(p.requires_grad for p in ours.parameters())
    state = torch.load(path)
    state.pop("features.28.weight")
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="torn.pth.*28.weight is missing"):
        fid.build_lpips(tmp_path / "torn.pth", torch.device("cpu"))


def test_hinge_loss_by_hand():
    """The discriminator's loss differs from half of mean relu(1 - D(x)) + mean relu(1 + D(x_rec))."""
    loss = train_vae.DiscriminatorLoss(nn.Identity())
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + (0 + 1 + 2) / 3))
    assert train_vae.PatchGAN()(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


# One step of train_vae.py at 32 x 32, batch 4, on the first images of `small`
ONE_STEP = ("--preset", "demo", "--resolution", 32, "--flip", 0, "--batch", 4, "--steps", 1, "--lr", 1e-3,
            "--kl", 0,
            "--lpips", 0, "--gan", 0, "--log-every", 1, "--mapper-mlp", 64, "--precision", "fp32")
# Flags that leave one loss alone -> the modules that it moves, by the table at the head of train_vae.py
GRADIENT_FLOW = {
    "lpips": (("--lpips", 1, "--align", "none"), "encoder decoder"),
    "kl": (("--kl", 1, "--align", "none"), "encoder"),
    # L_disc always runs beside L_GAN
    "gan": (("--gan", 1, "--align", "none"), "encoder decoder discriminator"),
    "align": (("--align", "send", *VFM), "encoder mapper"),
    "vavae": (("--align", "vavae", *VFM), "encoder mapper"),
    "warm-up": (("--align", "send", *VFM, "--mapper-warmup", 1), "mapper")}


@pytest.mark.parametrize("which", GRADIENT_FLOW)
def test_gradient_flow(which, small, vgg, tmp_path, monkeypatch):
    """A loss moves other modules than the table at the head of train_vae.py says, or a frozen network."""
    flags, moved = GRADIENT_FLOW[which]
    # of the likelihood, which is off here
    monkeypatch.setattr(train_vae, "vavae_ratio", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(F, "l1_loss", lambda x_rec, x: x_rec.sum() * 0)
    seen, resume = {}, common.Run.resume
    frozen = []
    for name, build in (("VFM", train_vae.VFM), ("build_lpips", train_vae.build_lpips)):
        def keep(*args, build=build, **kwargs):
            frozen.append(build(*args, **kwargs))
            return frozen[-1]
        monkeypatch.setattr(train_vae, name, keep)

    def hashes(modules):
        vae_parts = dict(encoder=nn.ModuleList([modules["vae"].encoder, modules["vae"].quant_conv]),
                         decoder=nn.ModuleList([modules["vae"].decoder, modules["vae"].post_quant_conv]))
        parts = vae_parts | {k: modules[k] for k in ("mapper", "discriminator") if modules[k] is not None}
        return {k: common.weights_hash(m.state_dict()) for k, m in parts.items()}

    def noting(run, modules, *rest):
        seen.update(modules=modules, before=hashes(modules),
                    frozen=[common.weights_hash(f.state_dict()) for f in frozen])
        return resume(run, modules, *rest)
    monkeypatch.setattr(common.Run, "resume", noting)
    do("train_vae", "--data", small / "images", *ONE_STEP, "--lpips-ckpt", vgg[1], *flags, "--out", tmp_path)
    after = hashes(seen["modules"])
    assert {k for k in after if after[k] != seen["before"][k]} == set(moved.split())
    assert [common.weights_hash(f.state_dict()) for f in frozen] == seen["frozen"]


@pytest.mark.parametrize("rec,align", [("l1", "send"), ("mse", "send"), ("l1", "vavae")])
def test_losses_by_hand(rec, align, small, vgg, tmp_path):
    """A part of equation (3) is scaled, has another noise or target; the gradient is not the weighted sum's;
    VA-VAE's alignment is weighed by other gradients than those of the likelihood in the encoder's last
    layer."""
    weights = dict(rec=1, kl=1e-3, lpips=0.5, gan=0.1, align=2.0)
    flags = (*ONE_STEP, "--rec", rec, "--kl", 1e-3, "--gan", 0.1, "--lpips", 0.5, "--lpips-ckpt", vgg[1],
             "--align", align,
             "--lambda-align", 2, *VFM, "--seed", 3, "--micro-batch", 2)
    do("train_vae", "--data", small / "images", *flags, "--out", tmp_path)
    found = metrics(tmp_path)[1][0]

    images = data.ImageFolder(small / "images", 32)
    x = data.to_float(torch.stack([images[row][0] for row in data.sample_order(40, 3, range(4))]))
    a, eps, eps_align = data.draw_noise(3, range(4), 1, (4, 8, 8), (4, 8, 8))
    torch.manual_seed(3)
    model = vae.AutoencoderKL(**vae.VAE_CONFIGS["demo"])
    vfm = mapper.VFM("tf_efficientnet_lite0", 32, 8, LITE0)
    torch.manual_seed(4)
    h = mapper.Mapper(4, 8, 8, 112, mlp_width=64) if align == "send" else mapper.LinearMapper(4, 8, 8, 112)
    torch.manual_seed(5)
    discriminator = train_vae.PatchGAN(norm="group")
    q = model.encode(x)
    z = q.sample(eps)
    x_rec = model.decode(z)
    mean = z.detach().mean((0, 2, 3), keepdim=True)
    var = z.detach().var((0, 2, 3), unbiased=False, keepdim=True)
    z_t = mapper.add_noise((z - mean) / (var + 1e-4).sqrt(), a=a[:, 0], eps=eps_align)
    judged = fid.build_lpips(vgg[1], torch.device("cpu"))(x_rec, x).mean()
    expected = dict(rec=(x_rec - x).abs().mean() if rec == "l1" else (x_rec - x).square().mean(), kl=q.kl(),
                    lpips=judged, gan=-discriminator(x_rec).mean(), align=mapper.align_loss(h(z_t), vfm(x)))
    if align == "vavae":
        # pairs are of one micro-batch's images
        per_part = [mapper.vavae_loss(h(z[i:i + 2]), vfm(x[i:i + 2])) for i in (0, 2)]
        expected["align"] = sum(per_part) / 2
        likelihood, last = expected["rec"] + 0.5 * expected["lpips"], model.encoder.conv_out.weight
        gradients = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (likelihood,
                                                                                         expected["align"])]
        expected["align_ratio"] = gradients[0] / (gradients[1] + 1e-4)
        weights["align"] = 2 * expected["align_ratio"].item()
    disc = (F.relu(1 - discriminator(x)).mean() + F.relu(1 + discriminator(x_rec)).mean()) / 2
    total = sum(w * expected[k] for k, w in weights.items())
    for name, value, module in (("grad_norm", total, model), ("mapper_grad_norm", total, h),
                                ("disc_grad_norm", disc, discriminator)):
        gradients = torch.autograd.grad(value, module.parameters(), retain_graph=True)
        expected[name] = torch.cat([g.double().flatten() for g in gradients]).norm()
    expected["disc"] = disc
    assert expected.keys() == found.keys() - {"step", "lr", "images_per_s", "seconds"}
    for k, v in expected.items():
        assert found[k] == pytest.approx(v.item(), rel=1e-3 if "norm" in k or "ratio" in k else 1e-4,
                                         abs=1e-6), k


def test_standardised_tokens(small, tmp_path):
    """--vfm-standardise measures over other axes or images, is left out of the loss, or depends on the
    cache."""
    folder, args = data.ImageFolder(small / "images", 32), SimpleNamespace(precision="fp32")
    cpu = SimpleNamespace(device=torch.device("cpu"), args=args)
    vfm = mapper.VFM("tf_efficientnet_lite0", 32, 8, LITE0)
    known = vfm(data.to_float(torch.stack([folder[i][0] for i in range(40)])))
    mean, std = train_vae.token_statistics(vfm, None, folder, cpu)
    torch.testing.assert_close(mean, known.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, known.flatten(0, 1).std(0), rtol=1e-3, atol=1e-5)
    command, losses = ("train_vae", "--data", small / "images", *ONE_STEP, *VFM), {}
    standard = ("--vfm-standardise", 1)
    arms = dict(plain=(), standard=standard, cached=(*standard, "--cache-vfm", tmp_path / "tokens"))
    for name, more in arms.items():
        do(*command, *more, "--out", tmp_path / name)
        losses[name] = metrics(tmp_path / name)[1][0]["align"]
    assert losses["standard"] == pytest.approx(losses["cached"], abs=1e-3)
    assert abs(losses["plain"] - losses["standard"]) > 1e-4


def test_patchgan_is_tamings(tmp_path):
    """Names or logits differ from taming's NLayerDiscriminator, so that a pre-trained one does not load or
    judges otherwise."""
    torch.manual_seed(0)
    layers, width = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2, True)], 64
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * width),
                   nn.LeakyReLU(0.2, True)]
        width *= 2
    peer = nn.ModuleDict({"main": nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))})
    for m in peer["main"]:
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.3)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    x, state = torch.randn(2, 3, 64, 64), peer.state_dict()
    for wrapped in (state, {"state_dict": {f"loss.discriminator.{k}": v for k, v in state.items()}}):
        torch.save(wrapped, tmp_path / "disc.pt")
        ours = train_vae.PatchGAN()
        train_vae.load_discriminator(ours, tmp_path / "disc.pt")
        for mode in (False, True):  # the statistics of the file, then those of the batch
            theirs = copy.deepcopy(peer)["main"].train(mode)(x)
            torch.testing.assert_close(ours.train(mode)(x), theirs, rtol=1e-4, atol=1e-4)
    torch.save({"main.0.weight": torch.zeros(64, 3, 4, 4)}, tmp_path / "part")
    torch.save({"a": torch.zeros(1)}, tmp_path / "none")
    for name, words in (("part", "main.0.bias is missing"), ("none", "no discriminator"), ("gone",
                                                                                           "no such")):
        with pytest.raises(UserError, match=words):
            train_vae.load_discriminator(train_vae.PatchGAN(), tmp_path / name)


def test_a_pretrained_discriminator(small, tmp_path):
    """--disc-ckpt is ignored, or its batch norm is left behind."""
    torch.manual_seed(7)
    torch.save(train_vae.PatchGAN().state_dict(), tmp_path / "disc.pt")
    command = ("train_vae", "--data", small / "images", *ONE_STEP, "--align", "none", "--gan", 0.1, "--lr", 0)
    do(*command, "--disc-ckpt", tmp_path / "disc.pt", "--out", tmp_path / "out")
    found = common.load_checkpoint(tmp_path / "out/vae.pt")["discriminator"]
    given = torch.load(tmp_path / "disc.pt")
    assert all(torch.equal(found[k], given[k]) for k in given if "running" not in k and "tracked" not in k)
    assert found["main.3.num_batches_tracked"] > 0
    assert_refused(call(*command, "--disc-ckpt", tmp_path / "gone.pt", "--out", tmp_path / "x"), "gone.pt")


def test_schedules_of_the_losses(small, vgg, tmp_path):
    """The full loss of the paper does not run, or gan-start and warm-ups are ignored."""
    flags = ("--lpips", 1, "--lpips-ckpt", vgg[1], "--gan-start", 1, "--steps", 2, "--lr-warmup", 4,
             "--lr-decay", 1,
             "--noise", 0, "--mapper-depth", 0)
    do("train_vae", "--data", small / "images", *SMALL_VAE, *ALL_LOSSES, *flags, "--out", tmp_path)
    first, second = metrics(tmp_path)[1]
    assert "gan" not in first and "disc" not in first and {"gan", "disc", "lpips", "align"} <= second.keys()
    assert first["lr"] == pytest.approx(1e-3 / 4, abs=1e-6)


@pytest.mark.parametrize("flags,align,weight", [
    ((), "send", 1.0), (("--align", "vavae"), "vavae", 0.1), (("--align", "none"), "none",
                                                              0.0), (("--lambda-align", "0"), "none", 0.0)])
def test_align_flag(flags, align, weight, monkeypatch):
    """--align none is not lambda 0, or an arm has another default weight."""
    monkeypatch.setattr(sys, "argv", ["train_vae.py", "--data", "a", "--out", "b", "--preset", "demo",
                                      *flags])
    args = train_vae.parse_args()
    assert (args.align, args.lambda_align) == (align, weight)


def test_latent_stats():
    """The mapper's input is normalised with other statistics than the batch's, or they depend on its split;
    the gradient is not batch norm's, so that scaling z up evades the noise of eq. (1)."""
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5]).view(1, 4, 1, 1)
    z, target = (torch.randn(8, 4, 3, 3) * scale + 5).requires_grad_(), torch.randn(8, 4, 3, 3)
    normal = F.batch_norm(z, None, None, training=True, eps=1e-4)
    expected, = torch.autograd.grad((normal * target).sum(), z)
    stats = train_vae.LatentStats(4, torch.device("cpu"))
    for _ in range(3):  # statistics, then those of the gradient, then the gradient with both
        values, gradients = [], []
        for part, weight in zip(z.detach().split(3), target.split(3)):
            part.requires_grad_(True)
            values.append(stats.normalise(part))
            gradients += torch.autograd.grad((values[-1] * weight).sum(), part)
            stats.add(part.detach())
        stats.update(momentum=1.0)
    torch.testing.assert_close(torch.cat(values), normal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-3, atol=1e-4)
    mean, var = stats.mean.clone(), stats.var.clone()
    stats.add(2 * z.detach())
    stats.update(momentum=0.1)
    torch.testing.assert_close(stats.mean, 1.1 * mean)
    torch.testing.assert_close(stats.var, 1.3 * var)


def test_learning_rate():
    """Warm-up or decay misses its ends."""
    args = SimpleNamespace(lr=0.1, lr_warmup=4, lr_decay=1, steps=100)
    for step, rate in ((0, 0.025), (50, 0.05), (100, 0)):
        assert common.learning_rate(args, step) == pytest.approx(rate)
    args.lr_decay = 0
    assert common.learning_rate(args, 99) == 0.1


def test_losses_wait_for_a_look():
    """A value that is not finite is missed between two looks, or named by another step or other images; parts
    that come and go are mixed up; the means by time are others."""
    losses = common.Losses()
    losses.add(1, {"rec": torch.tensor(1.0)})
    losses.add(2, {"rec": torch.tensor(2.0), "gan": torch.tensor(-3.0)})
    assert losses.look(None, "") == {"rec": 2.0, "gan": -3.0}
    for step, value in ((3, 4.0), (4, float("nan")), (5, 6.0)):
        losses.add(step, {"rec": torch.tensor(value)}, torch.tensor([1.0, value, 2.0]))
    with pytest.raises(UserError,
                       match=r"step 4: rec not finite .* 1 of the batch's images, 1 \(3-1\).* and rest"):
        losses.look(lambda step, places: [f"{step}-{p}" for p in places], "rest")
    losses = common.Losses()
    for each, t in (([1.0, 2.0], [0.05, 0.999]), ([5.0, 9.0], [0.0, 1.0])):
        losses.add(1, {"velocity": torch.tensor(1.0)}, torch.tensor(each), torch.tensor(t))
    losses.look(None, "")
    assert losses.by_time() == [3.0, *[None] * 8, 5.5] and losses.by_time() == [None] * 10
