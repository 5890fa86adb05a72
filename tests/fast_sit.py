from helpers import *  # noqa: F403


# ------------------------------------------------------------------------------------------------------------
# sit.py and extras/convert.py: SiTs


def test_sit_stands_alone():
    """sit.py imports more than torch, so that it cannot be taken into another project."""
    body = ast.parse((HERE / "sit.py").read_text()).body
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
             for n in body if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert {n.split(".")[0] for n in names} <= {"argparse", "functools", "math", "torch"}


@pytest.mark.parametrize("name,millions", [("S", 32.6), ("B", 130), ("L", 458), ("XL", 675)])
def test_sit_sizes(name, millions):
    """A size of the table in the SiT paper has other widths."""
    with torch.device("meta"):
        latents = dict(input_size=32, in_channels=4, num_classes=1000)
        two, one = (sit.SIT_MODELS[f"SiT-{name}/{p}"](**latents) for p in (2, 1))
        v = two(torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.long))
    assert v.shape == (2, 4, 32, 32) and count(two) == pytest.approx(millions * 1e6, rel=0.01)
    assert (two.grid, one.grid) == (16, 32)


def test_sit_starts_at_zero():
    """adaLN-Zero is not zero: the output and the blocks must begin as nothing."""
    model, x = tiny_sit(z_dim=7, repa_block=1, projector_dim=8), torch.randn(2, 3, 4, 4)
    v, projection = model(x, torch.rand(2), torch.tensor([0, 5]), features=True)
    assert v.shape == (2, 3, 4, 4) and v.abs().max() == 0 and projection.shape == (2, 4, 7)
    h = torch.randn(2, 4, 32)
    assert torch.equal(model.blocks[0](h, torch.randn(2, 32)), h)


def test_sit_patches():
    """Patches are put back in another order than they were cut."""
    model = tiny_sit(in_channels=4, hidden_size=16, num_heads=1, depth=0, num_classes=1)
    model.pos_embed.zero_()
    model.x_embedder.proj.weight.data.copy_(torch.eye(16).view(16, 4, 2, 2))  # token: (channel, row, column)
    model.final_layer.norm_final = nn.Identity()
    order = torch.arange(16).view(4, 2, 2).permute(1, 2, 0).flatten()  # DiT's output: (row, column, channel)
    model.final_layer.linear.weight.data.copy_(torch.eye(16)[order])
    x = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)), x)


def test_positions_are_the_releases():
    """Sine-cosine positions differ from the MAE code's, with which the public checkpoints were trained."""
    def one_axis(dim, position):
        angle = np.outer(position.reshape(-1), 1 / 10000 ** (np.arange(dim // 2) / (dim / 2)))
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)
    w, h = np.meshgrid(np.arange(5.0), np.arange(5.0))
    expected = np.concatenate([one_axis(8, w), one_axis(8, h)], 1)
    np.testing.assert_allclose(sit.sincos_2d(16, 5).numpy(), expected, atol=1e-6)


def test_attention_is_softmax():
    """The CPU's short way in bf16, or the fused kernel, is not softmax(q k^T / sqrt(d)) v."""
    torch.manual_seed(0)
    assert vae.attention is sit.attention
    for n, dtype in ((64, torch.float32), (64, torch.bfloat16), (300, torch.bfloat16)):
        q, k, v = torch.randn(3, 2, 4, n, 32).to(dtype)
        w = (torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 32 ** 0.5).softmax(-1)
        expected = torch.einsum("bhnm,bhmd->bhnd", w, v.double())
        error = (sit.attention(q, k, v).double() - expected).abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 0.02)


def random_sit(**changes):
    """A SiT whose velocity is not zero."""
    model = tiny_sit(**changes).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.requires_grad_(False)


def test_sit_hears_time_and_label():
    """The prediction ignores t or the label, or an image sees its neighbours."""
    model = random_sit()
    x, t, y = torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 5])
    v = model(x, t, y)
    assert (model(x, t + 0.1, y) - v).abs().amax((1, 2, 3)).min() > 1e-3
    assert (model(x, t, y.flip(0)) - v)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), v[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_paths_derivative(path):
    """The training target is not the time derivative of x_t, or the path's ends are not data and noise."""
    x, eps = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    point = lambda t: sit.interpolate(x, eps, t, path)[0]
    _, derivative = torch.autograd.functional.jvp(point, t, torch.ones_like(t))
    torch.testing.assert_close(sit.interpolate(x, eps, t, path)[1], derivative)
    torch.testing.assert_close(point(torch.zeros_like(t)), x)
    torch.testing.assert_close(point(torch.ones_like(t)), eps)


def test_sit_losses():
    """The velocity loss is no mean over an image, or the REPA loss no negative cosine; times leave (0, 1)."""
    v = torch.zeros(2, 1, 2, 2)
    target = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand_as(v)
    assert sit.velocity_loss(v, target).tolist() == [1, 9]
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert sit.repa_loss(x, 5 * x).item() == pytest.approx(-1)
    assert sit.repa_loss(x, x.flip(-1)).item() == pytest.approx(0)
    u, n = torch.rand(4000), torch.randn(4000)
    assert torch.equal(sit.draw_time(u, n), u)
    t = sit.draw_time(u, n, "lognormal")
    assert 0 < t.min() and t.max() < 1 and torch.equal(torch.logit(t, eps=1e-6) > 0, n > 0)
    for path in ("linear", "cosine"):  # REPA's: noise over signal is log-normal
        alpha, sigma, _, _ = sit.path_coefficients(sit.draw_time(u, n, "lognormal", path).double(), path)
        torch.testing.assert_close(sigma / alpha, n.double().exp(), rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Samplers


class Gaussian:
    """The exact velocity for data N(m, s^2) in each number; class 0 has mean m, no class has mean 0."""

    def __init__(self, m, s, path="linear"):
        self.m, self.s, self.path, self.num_classes, self.calls = m, s, path, 1, 0

    def __call__(self, x, t, y):
        self.calls += 1
        alpha, sigma, d_alpha, d_sigma = sit.path_coefficients(t.double().view(-1, 1, 1, 1), self.path)
        m = self.m * (y == 0).double().view(-1, 1, 1, 1)
        from_mean = (x - alpha * m) / (alpha ** 2 * self.s ** 2 + sigma ** 2)
        return d_alpha * (m + alpha * self.s ** 2 * from_mean) + d_sigma * sigma * from_mean


class CorrelatedGaussian:
    """The exact velocity for data N(m, S) with a full covariance matrix S, over all numbers of x."""

    def __init__(self, m, S, path):
        self.m, self.S, self.path, self.num_classes = m, S, path, 1

    def __call__(self, x, t, y):
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in sit.path_coefficients(t[0].double(), self.path))
        z = x.double().flatten(1) - alpha * self.m
        S = alpha ** 2 * self.S + sigma ** 2 * torch.eye(len(self.m), dtype=torch.float64)
        w = torch.linalg.solve(S, z.T).T
        return (d_alpha * (self.m + alpha * w @ self.S) + d_sigma * sigma * w).view(x.shape)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_samplers_reach_the_covariance(sampler, path):
    """A sampler reaches the spread of each number but not how they vary together, or neither."""
    torch.manual_seed(0)
    root = torch.tensor([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [-0.5, 0.2, 0.7, 0], [0.1, -0.9, 0.3, 0.4]]).double()
    m, S = torch.tensor([1, -2, 0.5, 3]).double(), root @ root.T
    noise, y = torch.randn(20_000, 1, 2, 2), torch.zeros(20_000).long()
    sample, steps = (sit.sample_ode, 50) if sampler == "heun" else (sit.sample_sde, 250)
    x = sample(CorrelatedGaussian(m, S, path), noise, y, steps, path=path).double().flatten(1)
    assert (x.mean(0) - m).abs().max() < 0.04 and (torch.cov(x.T) - S).abs().max() < 0.04


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_score(path):
    """The score differs from the Gaussian's own, -(x - alpha m) / (alpha^2 s^2 + sigma^2)."""
    x, y = torch.randn(8, 1, 2, 2, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
    for t in (1.0, 0.7, 0.3, 0.04):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma, _, _ = sit.path_coefficients(t, path)
        expected = -(x - alpha * 2) / (alpha ** 2 * 0.25 + sigma ** 2)
        v = Gaussian(2.0, 0.5, path)(x, t, y)
        torch.testing.assert_close(sit.score_from_velocity(v, x, t, path), expected)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_trajectory_by_hand(path):
    """A trajectory of the SDE sampler leaves REPA's: dx = (v - t s) dt + sqrt(2 t |dt|) eps down to 0.04,
    then the mean alone."""
    model = random_sit(in_channels=4, input_size=8, num_classes=3)
    noise, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    eps = [torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(5)]
    ours = sit.sample_sde(model, noise, y, 6, cfg=2.5, interval=(0.1, 0.7), path=path, draw=lambda i: eps[i])
    f = lambda x, t, y: model(x.float(), torch.full((2,), t, dtype=torch.float32), y).double()
    times, x, half = [*np.linspace(1, 0.04, 6), 0.0], noise.double(), np.pi / 2
    for i in range(6):
        t, dt = times[i], times[i + 1] - times[i]
        v = f(x, t, y)
        if 0.1 <= t <= 0.7:
            u = f(x, t, torch.full_like(y, 3))
            v = u + 2.5 * (v - u)
        cosine = np.cos(t * half), np.sin(t * half), -half * np.sin(t * half), half * np.cos(t * half)
        a, s, da, ds = cosine if path == "cosine" else (1 - t, t, -1, 1)
        score = (a / da * v - x) / (s ** 2 - a / da * ds * s)
        x = x + (v - 0.5 * 2 * t * score) * dt + (np.sqrt(2 * t * -dt) * eps[i] if i < 5 else 0)
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_ode_trajectory_by_hand(method):
    """A trajectory of the ODE samplers leaves the textbook's."""
    model = random_sit(in_channels=4, input_size=8, num_classes=3)
    noise, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    f = lambda x, t: model(x.float(), torch.full((2,), t, dtype=torch.float32), y).double()
    times, x = np.linspace(1, 0, 6), noise.double()
    for t, s in zip(times[:-1], times[1:], strict=True):
        k = f(x, t)
        x = x + (s - t) * (k if method == "euler" or s == 0 else (k + f(x + (s - t) * k, s)) / 2)
    ours = sit.sample_ode(model, noise, y, 5, method=method)
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-4)


def test_guidance():
    """Guidance is not v_u + s (v_c - v_u) for t within its interval, or runs twice when it is off."""
    class Constant:
        num_classes, rows = 3, 0

        def __call__(self, x, t, y):
            self.rows += len(x)
            return torch.where(y == 3, 1.0, 2.0).view(-1, 1, 1, 1).expand_as(x)

    noise, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 2])
    for cfg, interval, guided in ((1, (0, 1), 0), (3, (0, 1), 8), (3, (0.25, 0.5), 3), (0, (0.9, 1), 1)):
        model = Constant()
        x = sit.sample_ode(model, noise, labels, 8, cfg, interval, method="euler")  # t = 1, 0.875 ... 0.125
        v = (8 - guided) * 2 + guided * (1 + cfg * (2 - 1))
        assert x.flatten().tolist() == pytest.approx([-v / 8] * 2) and model.rows == 2 * (8 + guided)


def test_autoguidance():
    """AutoGuidance mixes other velocities than the model's and the weaker model's, both with the class,
    leaves its interval, or is not passed on by a sampler."""
    strong, weak = Gaussian(2.0, 0.5), Gaussian(1.0, 0.5)
    x, y = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for t, cfg, guided in ((0.5, 3.0, True), (0.9, 3.0, False), (0.5, 1.0, False)):
        t, weak.calls = torch.tensor(t, dtype=torch.float64), 0
        v, w = (m(x.float(), t.float().expand(4), y) for m in (strong, weak))
        found = sit.guided_velocity(strong, x, t, y, cfg, (0, 0.7), weak)
        torch.testing.assert_close(found, w + cfg * (v - w) if guided else v, rtol=1e-5, atol=1e-5)
        assert weak.calls == 1 + guided
    noise = torch.randn(4000, 1, 1, 1)  # the mixture of two such velocities is that of mean 1 + 3 (2 - 1)
    for sampler in (sit.sample_ode, sit.sample_sde):
        z = sampler(strong, noise, torch.zeros(4000, dtype=torch.long), 100, cfg=3.0, guide=weak)
        assert z.mean().item() == pytest.approx(4, abs=0.05)
        assert z.std().item() == pytest.approx(0.5, rel=0.05)


def test_nfe():
    """The printed number of evaluations is not what the sampler spends."""
    noise, labels = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    for sampler, method, nfe in (("ode", ("euler",), 5), ("ode", ("heun",), 9), ("sde", (), 5)):
        model = Gaussian(0.0, 1.0)
        z = getattr(sit, f"sample_{sampler}")(model, noise, labels, 5, 1.0, (0, 1), *method)
        assert z.dtype == torch.float32 and model.calls == nfe
    with pytest.raises(ValueError, match="rk4"):
        sit.sample_ode(Gaussian(0.0, 1.0), noise, labels, 5, method="rk4")


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


class PeerBlock(nn.Module):
    """A SiT block out of timm's attention and MLP, as the SiT and REPA code build it."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        attention = timm.models.vision_transformer.Attention
        self.attn = attention(dim, heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.mlp = timm.layers.Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)
        x = x + gate_a * self.attn(norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(norm(x) * (1 + scale_m) + shift_m)


class PeerSiT(nn.Module):
    """SiT in the releases' names: learn_sigma doubles the output; z_dim and bn are REPA-E's additions."""

    def __init__(self, grid, patch, channels, classes, depth, dim, heads, qk_norm=False, learn_sigma=False,
                 z_dim=0, bn=False):
        super().__init__()
        self.patch, self.sigma, self.channels = patch, learn_sigma, channels
        self.x_embedder = timm.layers.PatchEmbed(grid * patch, patch, channels, dim)
        mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(sit.sincos_2d(dim, grid)[None])
        self.blocks = nn.ModuleList(PeerBlock(dim, heads, qk_norm) for _ in range(depth))
        linear = nn.Linear(dim, patch ** 2 * channels * (1 + learn_sigma))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.final_layer = nn.ModuleDict({"linear": linear, "adaLN_modulation": modulation})
        if z_dim:
            layers = nn.Linear(dim, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, z_dim)
            self.projectors = nn.ModuleList([nn.Sequential(*layers)])
        if bn:
            self.bn = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
            self.bn.running_mean.normal_(), self.bn.running_var.uniform_(0.5, 3)

    def forward(self, x, t, y):
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], -1))
        c = c + self.y_embedder["embedding_table"](y)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        h = self.final_layer["linear"](F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        n = int(h.shape[1] ** 0.5)
        h = torch.einsum("nhwpqc->nchpwq", h.view(len(x), n, n, self.patch, self.patch, -1))
        h = h.reshape(len(x), -1, n * self.patch, n * self.patch)
        return h[:, :self.channels] if self.sigma else h


def peer_sit(monkeypatch, **changes):
    """A PeerSiT of a size that exists here alone, with random weights everywhere."""
    monkeypatch.setitem(sit.SIZES, "tiny", dict(depth=2, hidden_size=32, num_heads=4))
    torch.manual_seed(0)
    return PeerSiT(**dict(grid=4, patch=2, channels=4, classes=3, depth=2, dim=32, heads=4) | changes).eval()


@pytest.mark.parametrize("kind", ["repa", "repae", "repae qk", "sit"])
def test_released_sit(kind, tmp_path, monkeypatch):
    """A released SiT does not load, or computes another velocity: attention, positions, channels or time."""
    repae = dict(patch=1, channels=6, z_dim=10, bn=True, qk_norm="qk" in kind)
    peer = peer_sit(monkeypatch, **{"repa": dict(z_dim=10), "sit": dict(learn_sigma=True)}.get(kind, repae))
    state = peer.state_dict()
    file = {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(model="SiT"), "steps": 70}
    if kind == "repae":
        file["vae"] = {"encoder.conv_in.bias": torch.zeros(1)}
    torch.save(state if kind == "sit" else file, tmp_path / "a.pt")
    model, checkpoint = sit.load_sit(tmp_path / "a.pt")
    x = torch.randn(3, peer.channels, 4 * peer.patch, 4 * peer.patch)
    t, y = torch.tensor([0.04, 0.5, 1]), torch.arange(1, 4)
    with torch.no_grad():  # SiT runs from noise at 0 to data at 1
        expected = -peer(x, 1 - t, y) if kind == "sit" else peer(x, t, y)
        torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-4)
    assert model.num_classes == 3 and checkpoint["path"] == "linear"
    assert checkpoint["step"] == (None if kind == "sit" else 70)
    assert set(model.state_dict()) == {k for k in state if not k.startswith(("pos_embed", "bn."))}
    if kind.startswith("repae"):
        torch.testing.assert_close(checkpoint["latent_mean"], peer.bn.running_mean)
        torch.testing.assert_close(checkpoint["latent_std"], peer.bn.running_var.sqrt())
    else:
        assert checkpoint["latent_mean"] is None is checkpoint["latent_std"]
    assert checkpoint["vae"] == (str(tmp_path / "a.pt") if kind == "repae" else None)


def test_one_sit_step_is_the_peers(tmp_path, monkeypatch):
    """One optimiser step of the velocity and REPA losses moves the weights not as in timm's blocks."""
    peer = peer_sit(monkeypatch, z_dim=10)
    torch.save({"ema": peer.state_dict()}, tmp_path / "a.pt")
    model, _ = sit.load_sit(tmp_path / "a.pt")
    model.repa_block = 1
    model.requires_grad_(True)
    x, eps, t, y = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4)
    tokens, hidden = torch.randn(4, 16, 10), []
    peer.blocks[0].register_forward_hook(lambda _, __, h: hidden.append(h))
    v = peer((1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * eps, t, y)
    cosine = F.cosine_similarity(peer.projectors[0](hidden[0]), tokens, dim=-1).mean()
    expected = (v - (eps - x)).square().mean() - 0.5 * cosine
    x_t, target = sit.interpolate(x, eps, t)
    v, projection = model(x_t, t, y, features=True)
    total = sit.velocity_loss(v, target).mean() + 0.5 * sit.repa_loss(projection, tokens)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {k: p for k, p in peer.named_parameters() if k != "pos_embed"}
    for loss, parameters in ((expected, list(theirs.values())), (total, list(model.parameters()))):
        loss.backward()
        torch.optim.AdamW(parameters, 1e-4, weight_decay=0).step()
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for k, p in theirs.items():
        sure = p.grad.abs() > 1e-6  # Adam's first step is lr * sign(g), that of rounding alone where g is 0
        torch.testing.assert_close(ours[k][sure], p[sure], rtol=0, atol=1e-5)


def test_released_sit_that_does_not_fit(tmp_path, monkeypatch):
    """A key that is missing, renamed or misshapen is passed over, or not named with both shapes."""
    state = peer_sit(monkeypatch, z_dim=10).state_dict()
    key = "blocks.1.attn.qkv.bias"
    gone = {k: v for k, v in state.items() if k != key}
    for name, bad, words in (
            ("gone", gone, ["Missing", key]), ("renamed", {**gone, "blocks.1.attn.qkb": state[key]}, [key]),
            ("shape", {**state, "blocks.0.mlp.fc1.bias": torch.zeros(5)}, ["fc1.bias", "[5]", "[128]"]),
            ("positions", {**state, "pos_embed": torch.zeros(1, 16, 32)}, ["pos_embed (1, 16, 32)"]),
            ("size", {k: v for k, v in state.items() if "blocks.1" not in k}, ["depth 1"])):
        torch.save({"ema": bad}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=f"{name}.pt") as e:
            sit.load_sit(tmp_path / f"{name}.pt")
        assert all(w in str(e.value) for w in words), e.value


def test_released_sit_says_its_path(tmp_path, monkeypatch):
    """A release of another path, or that predicts something else than the velocity, is sampled."""
    for sigma, path, prediction, expected in (
            (False, "cosine", "v", "cosine"), (True, "Linear", "velocity", "linear"),
            (True, "GVP", "velocity", None), (False, "linear", "noise", None)):
        state = peer_sit(monkeypatch, learn_sigma=sigma).state_dict()
        settings = argparse.Namespace(path_type=path, prediction=prediction)
        torch.save({"ema": state, "args": settings}, tmp_path / "a.pt")
        if expected:
            assert sit.load_sit(tmp_path / "a.pt")[1]["path"] == expected
        else:
            with pytest.raises(ValueError, match=f"a.pt.*prediction {prediction} on the {path.lower()} path"):
                sit.load_sit(tmp_path / "a.pt")


def test_load_sit(tmp_path):
    """A checkpoint loads other weights than asked for, or a bad file ends in a traceback."""
    model, ema = tiny_sit(), tiny_sit()
    ema.y_embedder.embedding_table.weight.data += 1
    state = dict(config=model.config, model=model.state_dict(), ema=ema.state_dict(), step=3)
    torch.save(state, tmp_path / "a.pt")
    for weights, expected in (("ema", ema), ("model", model)):
        loaded, checkpoint = sit.load_sit(tmp_path / "a.pt", weights)
        assert common.weights_hash(loaded.state_dict()) == common.weights_hash(expected.state_dict())
        assert checkpoint["step"] == 3 and not loaded.training
    torch.save({**state, "config": {**model.config, "hidden_size": 64}}, tmp_path / "size.pt")
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    shutil.copy(tmp_path / "a.pt", tmp_path / "torn.pt")
    truncate(tmp_path / "torn.pt")
    for name in ("size", "foreign", "text", "torn", "missing"):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            sit.load_sit(tmp_path / f"{name}.pt")
