from helpers import *  # noqa: F403

import bench  # noqa: E402
from extras import peers  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# Speed: the fast paths compute what plain code does, and extras/bench.py tells the truth


def fast_step(loss, model, optimizer, precision, *inputs):
    """A training step of ours on a CPU -> its loss. optimizer: fused AdamW, as in both trainers."""
    optimizer.zero_grad(set_to_none=True)
    with common.autocast(torch.device("cpu"), precision):
        total, *_ = loss(*inputs)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total.item()


def fast_adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)


def sit_batch(k, size=8, tokens=16, dim=48):
    """((x, y, t, eps), tokens) of step k for a SiT of 5 classes on 4 channels, batch 4."""
    g = torch.Generator().manual_seed(k)
    x, eps = torch.randn(2, 4, 4, size, size, generator=g)
    y = torch.randint(0, 6, (4,), generator=g)
    return (x, y, torch.rand(4, generator=g), eps), torch.randn(4, tokens, dim, generator=g)


def small_sit():
    torch.manual_seed(0)
    model = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=5, depth=4, z_dim=48,
                                         projector_dim=64)
    for p in model.parameters():  # away from adaLN-Zero's start
        nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("bf16", 5e-3)])
def test_twenty_steps_of_sit(precision, tolerance):
    """The fast SiT step computes something else than the plain one: in fp32 beyond 1e-5, in bf16 beyond its
    rounding."""
    model = small_sit()
    plain = peers.sit_step(model, SimpleNamespace(lr=1e-3, path="linear", repa=0.5), "fp32")
    loss, optimizer = train_sit.SiTLoss(model, "linear", 0.5), fast_adamw(model, 1e-3)
    for k in range(20):
        batch, tokens = sit_batch(k)
        expected = plain(batch, tokens)
        found = fast_step(loss, model, optimizer, precision, *batch, tokens)
        assert found == pytest.approx(expected, rel=tolerance), k


def small_vae():
    """An autoencoder that diffusers has too: 32 groups of 4 channels, attention in its second level."""
    torch.manual_seed(0)
    return vae.AutoencoderKL(z_channels=3, ch=128, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(8,),
                             resolution=16)


def vae_batch(k):
    """(images, noise) of step k for small_vae(), batch 2."""
    g = torch.Generator().manual_seed(k)
    x = torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
    eps, eps_align = torch.randn(2, 2, 3, 8, 8, generator=g)
    return x.contiguous(memory_format=torch.channels_last), (torch.rand(2, generator=g), eps, eps_align)


@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_ten_steps_of_vae(precision, tolerance):
    """The fast VAE step computes something else than diffusers' in fp32 (1e-5), or in bf16 beyond its
    rounding."""
    model = small_vae()
    plain = peers.to_diffusers(model)
    ema, plain_optimizer = copy.deepcopy(plain), torch.optim.AdamW(plain.parameters(), 3e-5, weight_decay=0)
    loss = train_vae.VAELoss(model, None, dict(rec=1.0, kl=1e-6, align=0.0), "mse", "none")
    loss.to(memory_format=torch.channels_last)
    optimizer = fast_adamw(model, 3e-5)
    for k in range(10):
        x, noise = vae_batch(0)[0], vae_batch(k)[1]
        posterior = plain.encode(x).latent_dist
        x_rec = plain.decode(posterior.mean + posterior.std * noise[1]).sample
        expected = F.mse_loss(x_rec, x) + 1e-6 * posterior.kl().mean()
        expected.backward()
        peers.update(plain, ema, plain_optimizer)
        found = fast_step(loss, model, optimizer, precision, x, noise, None, None, True, None, None)
        assert found == pytest.approx(expected.item(), rel=tolerance), k


def test_plain_vae_step():
    """What `bench.py peers vae` times against begins with another loss than ours."""
    model, (x, noise), tokens = small_vae(), vae_batch(0), torch.randn(2, 64, 32)
    h, disc = mapper.Mapper(3, 16, 8, 32, mlp_width=64), train_vae.PatchGAN(norm="group")
    flags = SimpleNamespace(lr=3e-5, kl=1e-6, gan=0.1, lambda_align=1.0, precision="fp32")
    x = F.interpolate(x, (32, 32))  # the PatchGAN needs that many pixels
    noise = noise[0], *(F.interpolate(n, (16, 16)) for n in noise[1:])
    expected = peers.vae_step(model, h, disc, flags)(x, noise, tokens)
    loss = train_vae.VAELoss(model, h, dict(rec=1.0, kl=1e-6, gan=0.1, align=1.0), "l1", "send")
    stats = train_vae.LatentStats(3, torch.device("cpu"))
    stats.add(model.encode(x).sample(noise[1]).detach())
    stats.update(momentum=1.0)
    found = loss(x, noise, tokens, stats, True, disc, None)[0]
    assert expected == pytest.approx(found.item(), rel=1e-5)


def test_grad_checkpointing():
    """--grad-checkpointing changes the result, or saves no memory."""
    found = {}
    for on in (False, True):
        model, kept = small_sit(), []
        model.checkpointing = on
        loss, optimizer = train_sit.SiTLoss(model, "linear", 0.5), fast_adamw(model, 1e-3)
        keep = lambda v, kept=kept: kept.append(v.nbytes) or v
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            losses = [fast_step(loss, model, optimizer, "fp32", *batch, tokens)
                      for batch, tokens in map(sit_batch, range(3))]
        found[on] = losses, common.weights_hash(model.state_dict()), sum(kept)
    assert found[False][:2] == found[True][:2] and found[True][2] < 0.6 * found[False][2]


def test_cast_matmuls():
    """Weights kept in bf16 give other numbers than autocast, or a norm loses its precision."""
    model, vfm = small_sit(), mapper.VFM("tf_efficientnet_lite0", 64, 4, LITE0)
    (x, y, t, _), _ = sit_batch(0)
    image = torch.rand(2, 3, 64, 64) * 2 - 1

    @torch.no_grad()
    def outputs():
        with common.autocast(torch.device("cpu"), "bf16"):
            return model(x, t, y), vfm(image)

    before = outputs()
    for m in (model, vfm):
        common.cast_matmuls(m, torch.device("cpu"), "bf16")
    assert all(map(torch.equal, before, outputs()))
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert {m.weight.dtype for m in vfm.modules() if isinstance(m, nn.BatchNorm2d)} == {torch.float32}


def test_one_behind():
    """An item is stored before the next one is begun, or the last one is lost."""
    order = []
    for v in common.one_behind(order.append(f"begin {i}") or i for i in range(3)):
        order.append(f"store {v}")
    assert order == ["begin 0", "begin 1", "store 0", "begin 2", "store 1", "store 2"]
    assert list(common.one_behind(iter(()))) == []


def test_flops_by_hand():
    """Attention, a backward pass or a convolution is not counted, also in the CPU's fused kernel."""
    d, n, b = 128, 16, 2
    block, x, c = sit.Block(d, 2, False), torch.randn(b, n, d), torch.randn(b, d)
    forward = 2 * b * n * 12 * d * d + 2 * b * 6 * d * d + 4 * b * n * n * d
    conv, image = nn.Conv2d(3, 8, 3, padding=1), torch.randn(b, 3, 10, 10)

    def backward():
        block(x.requires_grad_(), c.requires_grad_()).sum().backward()

    for run, expected in ((lambda: block(x, c), forward), (backward, 3 * forward),
                          (lambda: conv(image), 2 * b * 100 * 3 * 8 * 9)):
        with bench.flop_counter() as counter:
            run()
        assert counter.get_total_flops() == expected


def test_clock_of_parts():
    """Parts overlap: a part within a part counts twice, or their sum is not the whole time."""
    clock = bench.Bench.__new__(bench.Bench)
    vars(clock).update(device=torch.device("cpu"), on=True, ms=Counter(), part="other", alias=None, parts=1)
    begin = clock.since = time.perf_counter()
    with clock.clock("forward"):
        time.sleep(0.02)
        with clock.clock("vfm"):
            time.sleep(0.05)
    clock.enter("other")
    assert sum(clock.ms.values()) == pytest.approx(1e3 * (time.perf_counter() - begin), abs=5)
    assert clock.ms["vfm"] > 50 and 20 < clock.ms["forward"] < 50


KEYS = {"stage", "machine", "processes", "precision", "command", "images_per_s", "spread", "ms", "step_ms",
        "peak_mib", "flops_per_image", "matmul_rate", "share_of_limit", "made"}


def check_record(file, images, parts, more=()):
    """What extras/bench.py wrote for steps of `images` images does not contradict itself."""
    r = json.loads(Path(file).read_text())
    assert r.keys() == KEYS | set(more)
    assert r["images_per_s"] == pytest.approx(images / r["step_ms"] * 1e3)
    assert r["spread"][0] <= r["images_per_s"] <= r["spread"][1]
    assert r["share_of_limit"] == pytest.approx(r["flops_per_image"] * r["images_per_s"] / r["matmul_rate"])
    assert r["flops_per_image"] > 1e5 and r["peak_mib"] > 100
    assert set(r["ms"]) == set(parts.split())
    assert 0.2 < sum(r["ms"].values()) / r["step_ms"] < 5  # wide: it is no assertion of speed
    return r


def test_bench(tmp_path):
    """The speed of a stage needs data or weights, changes what a script calls for good, or leaves files."""
    forward, file = torch.Tensor.backward, tmp_path / "new" / "bench.json"
    before = set(Path(tempfile.gettempdir()).glob("bench-*"))
    out = do("bench", "train_sit", "--model", "SiT-demo/2", "--batch", 4, "--micro-batch", 2, "--vfm",
             "tf_efficientnet_lite0", "--cache-vfm", "given", "--steps", 1, "--json", file)
    r = check_record(file, 4, "data forward backward optimiser ema")
    assert r["stage"] == "train_sit" and r["processes"] == 1 and f"{r['images_per_s']:.4g}" in out
    assert r["command"].startswith("bench.py train_sit --model SiT-demo/2")
    assert torch.Tensor.backward is forward and common.setup.__module__ == "common"
    assert set(Path(tempfile.gettempdir()).glob("bench-*")) <= before


@pytest.mark.parametrize("command,words", [
    (("train_sit", "--model", "SiT-demo/3"), ("train_sit.py", "--model")),
    (("train_sit", "--model", "SiT-demo/2", "--batch", 4, "--repa", 0, "--cache-vfm", "x"), ("--cache-vfm",)),
    (("encode",), ("required: --vae",)),
    (("encode", "--vae", "nothing.pt"), ("nothing.pt", "no such checkpoint")),
    (("sample", "--sit", "SiT-demo/2", "--dry-run"), ("sample: ended before",)),
    (("peers", "fid"), ("peers fid", "peers sit or peers vae")),
    (("train", "--steps", 1), ("invalid choice", "train_sit")),
    (("probe", "--steps", 0), ("--steps",))])
def test_bad_flags_of_bench(command, words):
    """A mistake in a flag, of bench.py or of the script that it runs, does not end in one line."""
    assert_refused(call("bench", *command), *words)
