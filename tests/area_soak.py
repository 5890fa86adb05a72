from helpers import *  # noqa: F403


# The long version

def soak(kills=20, terms=5, examples=4000):
    """Kills of every stage, then fuzzing of every reader; the last line counts."""
    passed, failed, read, begin = 0, 0, Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        small = make_small(folder / "small")
        for script in BAD_MOMENTS:
            rounds, count = kill_rounds(script, small, folder / script, kills, terms), len(BAD_MOMENTS[script]) + kills + terms
            for k in range(count):
                try:
                    print(next(rounds), flush=True)
                    passed += 1
                except (AssertionError, TimeoutError, OSError, ValueError):  # a failed check, a run that does not end, an output that cannot be read
                    traceback.print_exc()
                    failed += count - k  # a generator that raised has ended
                    break
        os.chdir(folder)
        (folder / "read").mkdir()
        for kind, seeds in fuzz_seeds(small, folder / "seeds").items():
            try:
                counts = fuzz(kind, seeds, folder / "read", examples)
                read += counts
                passed += 1
                print(f"fuzz {kind}: {dict(counts)}", flush=True)
            except Exception:  # what a reader should not have raised, whatever it is
                traceback.print_exc()
                failed += 1
    print(f"{passed + failed - len(FUZZED)} kills; {sum(read.values())} damaged files, {read['refused']} refused, the others read; {time.time() - begin:.0f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:] == ["--soak"]:
        soak()
    if sys.argv[1:2] != ["speed"] or sys.argv[2:] not in (["sit"], ["vae"], ["vae-fp32"]):
        sys.exit("usage: python test_all.py --soak, or speed sit|vae|vae-fp32    (the tests: bash run.sh test)")
    speed(sys.argv[2])
