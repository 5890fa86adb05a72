from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# Speed: the fast paths compute what the plain ones do, and --bench tells the truth. `python test_all.py speed sit|vae` times both.

class PlainBlock(nn.Module):
    """DiT's block as its release writes it, out of timm's parts."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = timm.models.vision_transformer.Attention(dim, num_heads=heads, qkv_bias=True)
        self.mlp = timm.layers.Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(sit.modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(sit.modulate(self.norm2(x), shift2, scale2))


def plain_sit(model):
    """The same SiT, same weights, of plain blocks."""
    plain, c = copy.deepcopy(model), model.config
    plain.blocks = nn.ModuleList(PlainBlock(c["hidden_size"], c["num_heads"]) for _ in model.blocks)
    plain.load_state_dict(model.state_dict())
    return plain


def plain_update(model, ema, optimizer, decay=0.9999):
    """The end of a step as SiT's and REPA's releases write it."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for a, b in zip(ema.parameters(), model.parameters()):
            a.mul_(decay).add_(b.data, alpha=1 - decay)


def plain_sit_step(t, precision, compiled=False):
    """A function of (batch, tokens) that trains a plain copy of the trainer's SiT -> loss."""
    model = plain_sit(t.model)
    ema, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), t.args.lr, weight_decay=0)
    loss = torch.compile(train_sit.SiTLoss(model, t.args.path, t.args.repa), disable=not compiled)

    def step(batch, tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total, *_ = loss(*batch, tokens)
        total.backward()
        plain_update(model, ema, optimizer)
        return total.item()
    return step


def plain_vae_step(t, precision):
    """A function of (pixels, noise, tokens) that trains diffusers' autoencoder with the trainer's weights, mapper and a plain PatchGAN,
    in PyTorch's usual layout and norms -> loss."""
    args = t.args
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        vae.export_diffusers(t.vae, folder)
        model = diffusers.AutoencoderKL.from_pretrained(folder).train()
    mapped, disc = copy.deepcopy(t.mapper).to(memory_format=torch.contiguous_format), copy.deepcopy(t.discriminator).to(memory_format=torch.contiguous_format)
    for i, m in enumerate(disc.main):
        if isinstance(m, vae.GroupNorm):
            disc.main[i] = nn.GroupNorm(m.num_groups, m.num_channels, eps=m.eps)
    both, ema = nn.ModuleList([model, mapped]), copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), args.lr, weight_decay=0) for m in (both, disc)]

    def step(pixels, noise, tokens):
        x, (a, eps, eps_align) = data.to_float(pixels), noise
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            q = model.encode(x).latent_dist
            z = q.mean.float() + q.std.float() * eps
            x_rec = model.decode(z).sample.float()
            disc.requires_grad_(False)
            z_n = (z - z.detach().mean((0, 2, 3), keepdim=True)) / (z.detach().var((0, 2, 3), unbiased=False, keepdim=True) + 1e-4).sqrt()
            loss = F.l1_loss(x_rec, x) + args.kl * q.kl().float().mean() - args.gan * disc(x_rec).mean()
            loss = loss + args.lambda_align * mapper.align_loss(mapped(mapper.add_noise(z_n, a=a, eps=eps_align)), tokens)
        loss.backward()
        disc.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            judged = 0.5 * (F.relu(1 - disc(x)).mean() + F.relu(1 + disc(x_rec.detach())).mean())
        judged.backward()
        nn.utils.clip_grad_norm_(disc.parameters(), 1.0)
        optimizers[1].step(), optimizers[1].zero_grad()
        nn.utils.clip_grad_norm_(mapped.parameters(), 1.0)
        plain_update(model, ema, optimizers[0])
        return loss.item()
    return step


def bench_args(module, *flags):
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", "--bench", "1", *map(str, flags)]
    try:
        return module.parse_args()
    finally:
        sys.argv = argv


def sit_trainer(folder, *flags):
    """A Trainer of train_sit.py on random latents, with tokens given."""
    args = bench_args(train_sit, "--cache-vfm", "given", *flags)
    args.data, args.steps = str(folder), 1000
    return train_sit.Trainer(args, train_sit.random_latents(args, folder), torch.device("cpu"), 0, 1)


def speed(which, steps=5):
    """Our step beside the plain one on the same random data, in turn, in one process: medians and ratios."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device, times = torch.device("cpu"), {}

    def race(runs, note):
        for run in runs.values():
            run(), run()
        times.update({k: [] for k in runs})
        for _ in range(steps):
            for k, run in runs.items():
                begin = time.perf_counter()
                run()
                times[k].append(time.perf_counter() - begin)
        for k in runs:
            print(f"{note}: {k}: {np.median(times[k]) * 1e3:.0f} ms a step ({min(times[k]) * 1e3:.0f} to {max(times[k]) * 1e3:.0f})", flush=True)

    print(data.machine(device))
    with tempfile.TemporaryDirectory() as folder:
        if which == "sit":
            flags = ("--model", "SiT-B/1", "--batch", 8, "--vfm", "vit_base_patch14_dinov2.lvd142m", "--precision", "bf16")
            t, fast = sit_trainer(folder, *flags, "--compile", 0), sit_trainer(folder, *flags, "--compile", 1)
            t.parallel(), fast.parallel()
            batch, tokens = t.draw(0), torch.randn(8, 256, 768)
            plain = {f"plain {p}{' compiled' * c}": (lambda step=plain_sit_step(t, p, c): step(batch, tokens)) for p, c in (("fp32", 0), ("bf16", 0), ("bf16", 1))}
            ours = {"ours bf16": lambda: t.train_step(batch, None, tokens), "ours bf16 compiled": lambda: fast.train_step(batch, None, tokens)}
        else:
            args = bench_args(train_vae, "--preset", "f16d32", "--batch", 2, "--lpips", 0, "--cache-vfm", "given", "--precision", which.removeprefix("vae-").replace("vae", "bf16"))
            t = train_vae.Trainer(args, device, 0, 1)
            t.parallel()
            batch = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8), t.draw(0), torch.randn(2, 256, 768)
            plain = {f"plain {args.precision}": (lambda step=plain_vae_step(t, args.precision): step(*batch))}
            ours = {f"ours {args.precision}": lambda: t.train_step(*batch)}
        race(dict(list(plain.items())[:1]), "glibc's allocator as it is")
        common.keep_memory(device)
        race({**plain, **ours}, "memory kept, as in common.setup()")
    for a in plain:
        for b in ours:
            print(f"{b} against {a}: {np.median(times[a]) / np.median(times[b]):.2f} times the images/s")


def test_fifty_steps_of_sit(tmp_path):
    """The fast SiT step computes something else than the plain one: in fp32 beyond 1e-5, in bf16 beyond its rounding."""
    flags = ("--model", "SiT-demo/2", "--batch", 8, *VFM, "--lr", 1e-3, "--compile", 0)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 5e-3)):
        t = sit_trainer(tmp_path, *flags, "--precision", precision)
        t.parallel()
        plain, tokens = plain_sit_step(t, "fp32"), torch.randn(8, 64, t.vfm.dim)
        for k in range(50):
            expected = plain(t.draw(k), tokens)
            parts = t.train_step(t.draw(k), None, tokens)
            assert (parts["velocity"] + 0.5 * parts["repa"]).item() == pytest.approx(expected, rel=tolerance), (precision, k)


def test_fifty_steps_of_vae(tmp_path):
    """The fast VAE step computes something else than diffusers' in fp32 (1e-5), or in bf16 beyond its rounding."""
    peer_vae().save_pretrained(tmp_path / "peer")
    folder = write_images(tmp_path / "images", 4, size=32)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 3e-2)):
        t, pixels = trainer(folder, "--init", tmp_path / "peer", "--resolution", 16, "--precision", precision, "--lr", 3e-5, "--rec", "mse")
        pixels = torch.stack([data.ImageFolder(folder, 16)[i][0] for i in range(4)])
        model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "peer").train()
        optimizer, x = torch.optim.AdamW(model.parameters(), 3e-5, weight_decay=0), data.to_float(pixels)
        for k in range(50):
            posterior = model.encode(x).latent_dist
            loss = F.mse_loss(model.decode(posterior.mean + posterior.std * t.draw(k)[1]).sample, x)
            (loss + 1e-6 * posterior.kl().mean()).backward()
            plain_update(model, copy.deepcopy(model), optimizer)
            assert t.train_step(pixels, t.draw(k), None)["rec"].item() == pytest.approx(loss.item(), rel=tolerance), (precision, k)


def test_plain_vae_step(tmp_path):
    """What `speed vae` times against begins with another loss than ours."""
    peer_vae().save_pretrained(tmp_path / "peer")
    t, _ = trainer(write_images(tmp_path / "images", 4, size=32), "--init", tmp_path / "peer", "--resolution", 32, "--gan", 0.1, "--lambda-align", 1, *VFM, "--mapper-mlp", 64)
    batch = torch.stack([data.ImageFolder(tmp_path / "images", 32)[i][0] for i in range(4)]), t.draw(0), torch.randn(4, 256, t.vfm.dim)
    plain, parts = plain_vae_step(t, "fp32")(*batch), t.train_step(*batch)
    assert plain == pytest.approx(sum(w * parts[k].item() for k, w in t.loss.weights.items() if k in parts), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_gradients(dtype):
    """Our backward of group norm on the CPU is not the derivative, also with a mean far from zero, in either layout."""
    torch.manual_seed(0)
    norm = vae.GroupNorm(64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, g = torch.randn(3, 64, 8, 6) * (1 + torch.rand(1, 64, 1, 1)) + (30 if dtype == torch.float32 else 1), torch.randn(3, 64, 8, 6)
    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    expected = torch.autograd.grad(F.group_norm(exact[0], norm.num_groups, *exact[1:], norm.eps), exact, g.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        found = torch.autograd.grad(norm(leaf), (leaf, norm.weight, norm.bias), g.to(dtype).contiguous(memory_format=layout))
        for a, b in zip(found, expected):
            assert (a.double() - b).norm() / b.norm() < (2e-6 if dtype == torch.float32 else 1e-2)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a wrong second derivative
        leaf = x.clone().requires_grad_()
        torch.autograd.grad((norm(leaf) * leaf).square().sum(), leaf, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("attention", [sit.attention, vae.attention])
def test_attention_is_softmax(attention):
    """The CPU's short way in bf16, or the fused kernel, is not softmax(q k^T / sqrt(d)) v."""
    torch.manual_seed(0)
    for n, dtype, tolerance in ((64, torch.float32, 1e-5), (64, torch.bfloat16, 0.02), (300, torch.bfloat16, 0.02)):
        q, k, v = torch.randn(3, 2, 4, n, 32).to(dtype)
        expected = torch.einsum("bhnm,bhmd->bhnd", (torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 32 ** 0.5).softmax(-1), v.double())
        assert (attention(q, k, v).double() - expected).abs().max() < tolerance


def test_grad_checkpointing(tmp_path):
    """--grad-checkpointing changes the result, or saves no memory."""
    found = {}
    for on in (0, 1):
        t = sit_trainer(tmp_path, "--model", "SiT-demo/2", "--batch", 8, *VFM, "--precision", "fp32", "--grad-checkpointing", on)
        t.parallel()
        tokens = torch.randn(8, 64, t.vfm.dim, generator=torch.Generator().manual_seed(1))
        parts = [t.train_step(t.draw(k), None, tokens) for k in range(3)]
        args = argparse.Namespace(**{**vars(t.args), "dry_run": True})
        found[on] = parts, train_sit.Trainer(args, t.latents, torch.device("meta"), 0, 1).memory(256), common.weights_hash(t.model.state_dict())
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2] and found[1][1] < 0.6 * found[0][1]


def test_cache_vfm(small, tmp_path, monkeypatch, capsys):
    """Cached tokens are not the VFM's of that crop, its mirror image or its row; another VFM's are taken; a stopped run begins anew;
    or training still reads images or runs the VFM."""
    images, cache = write_images(tmp_path / "images", 6, size=32), tmp_path / "tokens"
    flags = ("--lambda-align", 1, *VFM, "--mapper-mlp", 64, "--cache-vfm", cache)
    t, _ = trainer(images, *flags)
    folder = data.ImageFolder(images, 32, flip=True)
    stored = mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    pixels = torch.stack([folder[i][0] for i in (3, 9, 0)])
    torch.testing.assert_close(stored[[3, 9, 0]], t.vfm(data.to_float(pixels)).half().float(), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(stored[[3]], stored[[9]], atol=1e-2)
    original, writable = stored.tokens.copy(), [np.load(cache / f"{k}.npy", mmap_mode="r+") for k in ("tokens", "done")]
    for array in writable:
        array[:5] = 0
    seen, forward = [], mapper.VFM.forward
    monkeypatch.setattr(mapper.VFM, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    again = mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    assert sum(seen) == 5
    np.testing.assert_allclose(again.tokens, original, rtol=2e-3, atol=2e-3)  # another batch, another last digit
    content = (images / "a/000.png").read_bytes()
    (images / "a/000.png").write_bytes(content + b" ")  # the same name
    with pytest.raises(UserError, match="tokens with files"):
        mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], data.ImageFolder(images, 32, flip=True), 2, t.args, t.device, 0, 1)
    (images / "a/000.png").write_bytes(content)
    with pytest.raises(UserError, match="tokens with weights"):
        mapper.TokenCache(cache, t.vfm, "another", folder, 2, t.args, t.device, 0, 1)
    with pytest.raises(UserError, match="is no cache"):
        mapper.TokenCache(images, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    (cache / "done.npy").write_bytes(b""), (cache / "meta.json").rename(cache / "meta.json.tmp")
    mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)  # killed before the mark was there
    assert sum(seen) == 5 + 12
    seen.clear(), seen.append(5)
    (cache / "done.npy").write_bytes(b"")
    capsys.readouterr()
    mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    assert "damaged; begun anew" in capsys.readouterr().err
    assert sum(seen) == 5 + 12
    shutil.rmtree(cache)
    command = ("train_vae", "--data", images, "--preset", "demo", "--resolution", 32, "--lpips", 0, "--gan", 0, "--batch", 4, "--precision", "fp32", "--lambda-align", 1, *VFM, "--mapper-mlp", 64, "--log-every", 1)
    out = do(*command, "--steps", 3, "--cache-vfm", cache, "--out", tmp_path / "cached")
    assert "12 crops x 64 tokens x 112 in float16" in out
    do(*command, "--steps", 3, "--out", tmp_path / "plain")
    for a, b in zip(metrics(tmp_path / "cached")[1], metrics(tmp_path / "plain")[1]):
        assert a["align"] == pytest.approx(b["align"], rel=1e-3) and a["rec"] == pytest.approx(b["rec"], rel=1e-3)
    sit_command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM, "--precision", "fp32", "--log-every", 1, "--steps", 3)
    do(*sit_command, "--cache-vfm", tmp_path / "sit_tokens", "--out", tmp_path / "sit_cached")
    do(*sit_command, "--out", tmp_path / "sit_plain")
    seen.clear()
    shutil.copytree(small / "images", tmp_path / "gone")
    with monkeypatch.context() as m:
        m.setattr(data, "read_image", lambda *_: pytest.fail("an image was read"))
        do(*sit_command, "--cache-vfm", tmp_path / "sit_tokens", "--out", tmp_path / "sit_again")
    assert not seen
    for a, b, c in zip(*(metrics(tmp_path / f"sit_{k}")[1] for k in ("cached", "plain", "again"))):
        assert a["repa"] == pytest.approx(b["repa"], rel=1e-3) and a["repa"] == c["repa"]


def test_cache_vfm_on_two_processes(small, tmp_path):
    """Two processes write other tokens than one."""
    command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM, "--precision", "fp32", "--steps", 2)
    for ranks in (1, 2):
        run(*command, "--cache-vfm", tmp_path / f"tokens{ranks}", "--out", tmp_path / f"sit{ranks}", ranks=ranks)
    one, two = (np.load(tmp_path / f"tokens{k}/tokens.npy") for k in (1, 2))
    np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-3)
    assert_same_losses(tmp_path / "sit1", tmp_path / "sit2")


def test_parts_are_looked_at_later():
    """A value that is not finite is missed between two looks, or named by another step; parts that come and go are mixed up."""
    parts = data.Parts()
    parts.add(1, {"rec": torch.tensor(1.0)})
    parts.add(2, {"rec": torch.tensor(2.0), "gan": torch.tensor(-3.0)})
    assert parts.look("") == {"rec": 2.0, "gan": -3.0}
    for step, value in ((3, 4.0), (4, float("nan")), (5, 6.0)):
        parts.add(step, {"rec": torch.tensor(value)})
    with pytest.raises(UserError, match="step 4: rec not finite"):
        parts.look("")


def test_threaded_items():
    """Items of a thread come in another order, more than three are made ahead, or its error is lost."""
    begun = []

    def items():
        for i in range(6):
            begun.append(i)
            yield i
        raise UserError("the end")
    source, seen = data.threaded(items(), lambda v: v * v), []
    with pytest.raises(UserError, match="the end"):
        for v in source:
            seen.append(v)
            time.sleep(0.02)
            assert len(begun) <= len(seen) + 4
    assert seen == [0, 1, 4, 9, 16, 25]
    assert list(common.one_behind(iter(range(4)))) == [0, 1, 2, 3] and list(common.one_behind(iter(()))) == []
    order = []
    for v in common.one_behind(order.append(f"begin {i}") or i for i in range(3)):
        order.append(f"store {v}")
    assert order == ["begin 0", "begin 1", "store 0", "begin 2", "store 1", "store 2"]


def test_cast_matmuls(tmp_path):
    """Weights kept in bf16 give other numbers than autocast, or a norm loses its precision."""
    torch.manual_seed(0)
    model = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    vfm = mapper.VFM("tf_efficientnet_lite0", 64, 4, LITE0)
    x, image = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad(), common.autocast(torch.device("cpu"), "bf16"):
        before = model(x, torch.rand(2, generator=torch.Generator().manual_seed(0)), torch.arange(2)), vfm(image)
        for m in (model, vfm):
            common.cast_matmuls(m, torch.device("cpu"), "bf16")
        after = model(x, torch.rand(2, generator=torch.Generator().manual_seed(0)), torch.arange(2)), vfm(image)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert {m.weight.dtype for m in vfm.modules() if isinstance(m, nn.BatchNorm2d)} == {torch.float32}


def test_flops_by_hand():
    """Attention, a backward pass or a convolution is not counted."""
    d, n, b = 128, 16, 2
    with torch.device("meta"):
        block, x, c = sit.Block(d, 2, False), torch.empty(b, n, d), torch.empty(b, d)
        linear = 2 * b * n * 12 * d * d + 2 * b * 6 * d * d
        assert data.count_flops(lambda: block(x, c)) == linear + 4 * b * n * n * d
        forward = data.count_flops(lambda: block(x.requires_grad_(), c.requires_grad_()).sum().backward())
        assert forward == 3 * (linear + 4 * b * n * n * d)
        conv, image = nn.Conv2d(3, 8, 3, padding=1), torch.empty(b, 3, 10, 10)
        assert data.count_flops(lambda: conv(image)) == 2 * b * 100 * 3 * 8 * 9


def test_largest_micro_batch(monkeypatch):
    """The suggestion does not fill nine tenths of the memory, or ignores what a GPU's peak showed."""
    memory = lambda n: 2 ** 30 + n * 2 ** 28
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2 ** 20, "SC_PAGE_SIZE": 2 ** 13}.get)
    assert data.largest_micro_batch(memory, 4, torch.device("cpu")) == int((0.9 * 8 - 1) * 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 2 ** 33))
    monkeypatch.setattr(data, "peak_mib", lambda _: 1536)  # 4 images took half a GiB beyond the weights: half of the estimate
    assert data.largest_micro_batch(memory, 4, torch.device("cuda")) == int((0.9 * 8 - 1) * 8)


BENCHES = {"train_vae": ("--preset", "demo", "--batch", 4, "--micro-batch", 2, "--lpips", 0, "--vfm", "tf_efficientnet_lite0", "--mapper-mlp", 64),
           "train_vae given": ("--preset", "demo", "--batch", 4, "--lpips", 0, "--gan", 0, "--vfm", "tf_efficientnet_lite0", "--cache-vfm", "x"),
           "vae": ("--vae", "demo", "--micro-batch", 4, "--flip"), "train_sit": ("--model", "SiT-demo/2", "--batch", 4, "--vfm", "tf_efficientnet_lite0"),
           "train_sit given": ("--model", "SiT-demo/2", "--batch", 4, "--vfm", "tf_efficientnet_lite0", "--cache-vfm", "x"),
           "sample": ("--sit", "SiT-demo/2", "--micro-batch", 2, "--steps", 3, "--cfg", 1.5, "--sampler", "heun"), "fid": ("--images", 50), "probe": ()}


@pytest.mark.parametrize("which", BENCHES)
def test_bench(which, tmp_path):
    """A stage's --bench fails without data and weights, its parts do not add up to a step, or its numbers contradict each other."""
    script, file = which.split()[0], tmp_path / "bench.json"
    out = do(script, "--bench", 1 if script in ("fid", "probe") else 2, *BENCHES[which], "--json", file)
    r = json.loads(file.read_text())
    images = {"train_vae": 4, "vae": 4, "train_sit": 4, "sample": 2, "fid": 32, "probe": 2000}[script]
    assert r["images_per_s"] == pytest.approx(images / r["step_ms"] * 1e3) and r["spread"][0] <= r["images_per_s"] <= r["spread"][1]
    assert r["share_of_limit"] == pytest.approx(r["flops_per_image"] * r["images_per_s"] / r["matmul_rate"]) and r["flops_per_image"] > 1e5 and r["peak_mib"] > 100
    names = {"train_vae": {"data", "vfm", "forward", "backward", "optimiser", "discriminator", "ema"}, "train_vae given": {"data", "forward", "backward", "optimiser", "ema"},
             "train_sit": {"data", "vfm", "forward", "backward", "optimiser", "ema"}, "train_sit given": {"data", "forward", "backward", "optimiser", "ema"},
             "vae": {"data", "encode", "store"}, "sample": {"sit", "decode", "store"}, "fid": {"network", "statistics"}, "probe": {"axes", "solver"}}
    assert set(r["ms"]) == names[which] and 0.3 < sum(r["ms"].values()) / r["step_ms"] < 3  # wide: it is no assertion of speed
    assert ("largest_micro_batch" in r) == (script in ("train_vae", "train_sit")) and ("share_of_bare" in r) == (script in ("vae", "sample"))
    assert f"{r['images_per_s']:.4g} images/s" in out and not any(p.name == "x" for p in HERE.iterdir())


def test_bench_on_two_processes(tmp_path):
    """--bench under torchrun fails, or reports one process's share."""
    run("train_sit", "--bench", 1, "--model", "SiT-demo/2", "--batch", 4, "--repa", 0, "--json", tmp_path / "a.json", ranks=2)
    r = json.loads((tmp_path / "a.json").read_text())
    assert r["processes"] == 2 and r["images_per_s"] == pytest.approx(4 / r["step_ms"] * 1e3)


def test_flags_of_bench():
    """Without --bench a script forgets what it needs, or a flag without effect is taken."""
    assert_refused(call("train_sit", "--bench", 1, "--model", "SiT-demo/2", "--repa", 0, "--cache-vfm", "x"), "--cache-vfm: has no effect")
    assert_refused(call("train_vae", "--bench", 1, "--preset", "demo", "--lpips", 0, "--align", "none", "--cache-vfm", "x"), "--cache-vfm: has no effect")
    for command, missing in ((("train_sit",), "--latents, --out"), (("train_vae",), "--data, --out"), (("vae",), "--vae, --data, --out"), (("sample",), "--sit, --out"),
                             (("probe",), "vae, --data"), (("probe", "a"), "required: --data"), (("train_sit", "--bench", 1, "--dry-run"), "--bench does not go with --dry-run"),
                             (("vae", "export-diffusers", "--bench", 1), "--bench does not go with export-diffusers"), (("train_sit", "--latents", "a", "--out", "b", "--json", "c"), "--json: has no effect")):
        status, _, err = call(*command)
        assert status == 2 and missing in err


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("which", ["sit", "vae"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_step(which, tmp_path):
    """A compiled step breaks into graphs (an error with fullgraph), compiles anew for a later step or for the short last micro-batch, or
    computes something else. The VAE's with GAN, mapper and a ViT as VFM."""
    torch._dynamo.reset()
    flags, losses, generator = ("--batch", 6, "--micro-batch", 4, "--precision", "fp32", "--compile"), [], torch.Generator().manual_seed(0)
    pixels, tokens = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.randn(6, 64, 1280, generator=generator)
    for compiled in (0, 1):
        if which == "sit":
            t = sit_trainer(tmp_path, "--model", "SiT-demo/2", "--vfm", "tf_efficientnet_lite0", *flags, compiled)
            given = lambda k: (t.draw(k), None, tokens[:, :, :t.vfm.dim])
        else:
            t = train_vae.Trainer(bench_args(train_vae, "--preset", "demo", "--resolution", 32, "--lpips", 0, "--vfm", "deit_tiny_patch16_224", "--grid", 2, "--mapper-mlp", 64, *flags, compiled), torch.device("cpu"), 0, 1)
            given = lambda k: (pixels, t.draw(k), None)
        t.parallel()
        losses.append([v.item() for k in range(5) for v in t.train_step(*given(k)).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bench_looks_at_memory_last(tmp_path, capsys):
    """What is suggested from the peak of memory is worked out before any step has run."""
    args, ran = argparse.Namespace(bench=2, json=None, precision="fp32"), []
    data.run_bench(args, "a", torch.device("cpu"), lambda: ran.append(1), 1, 1, data.Clock(torch.device("cpu")), suggestion=lambda: len(ran))
    assert "suggestion: 6" in capsys.readouterr().out
