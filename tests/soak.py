"""The long fault run: kills of every stage at bad and random moments, then fuzzing of every reader.

    python tests/soak.py      # about an hour; the last line is `N passed, N failed`
"""
import collections
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "tests")]

import helpers  # noqa: E402
import test_faults  # noqa: E402

KILLS, TERMS, EXAMPLES = 20, 5, 4000


def main():
    passed, failed, read, begin = 0, 0, collections.Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        small = helpers.make_small(folder / "small")
        for script, moments in test_faults.BAD_MOMENTS.items():
            rounds = test_faults.kill_rounds(script, small, folder / script, KILLS, TERMS, moments)
            count = len(moments) + KILLS + TERMS
            for k in range(count):
                try:
                    print(next(rounds), flush=True)
                    passed += 1
                except Exception:  # a failed check, a run that does not end, an output that cannot be read
                    traceback.print_exc()
                    failed += count - k  # a generator that raised has ended
                    break
        os.chdir(folder)
        (folder / "read").mkdir()
        for kind, seeds in test_faults.fuzz_seeds(small, folder / "seeds").items():
            try:
                counts = test_faults.fuzz(seeds, folder / "read", EXAMPLES)
                read += counts
                passed += 1
                print(f"fuzz {kind}: {dict(counts)}", flush=True)
            except Exception:  # what a reader should not have raised, whatever it is
                traceback.print_exc()
                failed += 1
    print(f"{sum(read.values())} damaged files, {read['refused']} refused, the others read; "
          f"{time.time() - begin:.0f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
