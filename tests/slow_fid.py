from helpers import *  # noqa: F403


def test_oracle(tmp_path):
    """The oracle VFM does not learn its attributes, does not load as a VFM, or the random one is not the same
    network untrained."""
    root, lines = write_images(tmp_path / "images", 60, size=32), ["file,split,red,green"]
    for i, file in enumerate(data.find_images(root)):
        red, green = i % 2, i // 2 % 2
        Image.new("RGB", (32, 32), (255 * red, 255 * green, 4 * i)).save(root / file)
        lines.append(f"{file},{('train', 'train', 'test')[i % 3]},{red},{green}")
    (root / "attributes.csv").write_text("\n".join(lines) + "\n")
    do("extras.oracle", root, tmp_path / "random.safetensors", "--steps", 0)
    out = do("extras.oracle", root, tmp_path / "oracle.safetensors", "--steps", 12)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step ")]
    assert losses[-1] < 0.9 * losses[0] and "macro F1 of 2 attributes on 20 test images" in out
    x, tokens = torch.rand(2, 3, 32, 32) * 2 - 1, []
    for name in ("random", "oracle"):
        tokens.append(mapper.VFM("resnet10t", 32, 8, str(tmp_path / f"{name}.safetensors"))(x))
    assert tokens[0].shape == tokens[1].shape == (2, 64, 256) and not torch.allclose(*tokens, atol=0.1)
    first = safetensors.torch.load_file(tmp_path / "random.safetensors")
    torch.manual_seed(0)
    assert torch.equal(first["conv1.0.weight"], timm.create_model("resnet10t").state_dict()["conv1.0.weight"])
    assert "already there" in do("extras.oracle", root, tmp_path / "oracle.safetensors")


def test_packaged_vgg16():
    """A convolution's axes are turned round on the way from the package, or its pickle may name more than
    arrays."""
    rng, arrays = np.random.default_rng(0), {}
    model = torchvision.models.vgg16(weights=None).features
    for k, m in enumerate(m for m in model if isinstance(m, nn.Conv2d)):
        kernel = rng.standard_normal((3, 3, m.in_channels, m.out_channels), np.float32)
        arrays[f"Conv_{k}"] = dict(kernel=kernel, bias=np.full(m.out_channels, k, np.float32))
    state = extras_vgg16.convert(arrays)
    model.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    assert state["features.2.weight"][5, 7, 0, 2] == arrays["Conv_1"]["kernel"][0, 2, 7, 5]
    assert state["features.28.bias"][0] == 12
    read = lambda value: extras_vgg16.ArraysOnly(io.BytesIO(pickle.dumps(value, 3))).load()
    assert (read(arrays["Conv_0"])["kernel"] == arrays["Conv_0"]["kernel"]).all()
    with pytest.raises(UserError, match="posix.system|nt.system"):
        read(os.system)


def test_exported_weights(tmp_path):
    """The small file that is passed on holds another VAE than the checkpoint's average, loses its shape, or a
    cut one passes."""
    small, tmp_vae, model = tmp_path / "a.safetensors", tmp_path / "vae.pt", tiny_vae(resolution=32)
    torch.save(dict(config=model.config, vae={}, ema=model.state_dict()), tmp_vae)
    do("vae", "export", "--vae", tmp_vae, "--out", small)
    ours, theirs = vae.load_vae(small), vae.load_vae(tmp_vae)
    assert ours.config == theirs.config
    for (k, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=k)
    (tmp_path / "cut.safetensors").write_bytes(small.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut.safetensors.*not a readable checkpoint"):
        vae.load_vae(tmp_path / "cut.safetensors")
    assert_refused(call("vae", "export", "--vae", tmp_vae, "--out", tmp_path / "a.pt"), ".safetensors")
