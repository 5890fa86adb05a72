"""Slow tests: sit."""
import argparse

import pytest
import torch
from helpers import (
    Gaussian, peer_sit)

import sit


def test_nfe():
    """The printed number of evaluations is not what the sampler spends."""
    noise, labels = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    for sampler, method, nfe in (("ode", ("euler",), 5), ("ode", ("heun",), 9), ("sde", (), 5)):
        model = Gaussian(0.0, 1.0)
        z = getattr(sit, f"sample_{sampler}")(model, noise, labels, 5, 1.0, (0, 1), *method)
        assert z.dtype == torch.float32 and model.calls == nfe
    with pytest.raises(ValueError, match="rk4"):
        sit.sample_ode(Gaussian(0.0, 1.0), noise, labels, 5, method="rk4")


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
