"""Fixtures of all tests: tiny runs that are made once."""
from helpers import avatars, demo, hub, inception, judge, net, small, tmp_vae, vae_pair, vgg, warm_python  # noqa: F401
