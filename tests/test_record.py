"""A minute: what the code computes is what it computed when tests/record.json was written."""
import record
from helpers import forked


def test_nothing_moved(tmp_path):
    """Losses, weights, moments, samples or scores differ from the recorded ones, and nobody meant them to."""
    def run(*command):
        status, _, printed = forked(*command, log=tmp_path / "log", seconds=300)
        assert status == 0, f"{command}\n{printed}"

    found, *_ = record.compare(run)
    assert not found, "\n".join([*found, "is it the same in new processes? python tests/record.py"])
