"""Does `secateur bench A --against A` keep quiet? The same folder twice, again and again.

"quiet" is whether a run claims no difference in any quantity it measures: size, memory, prefill, decode at batch 1 and
8. The widest ratio is the median that was farthest from one. Prompts of 64 tokens, 16 new ones, 7 rounds, on otherwise
idle cores.

    python benchmarks/noise.py [--runs 20]
"""

from __future__ import annotations

import argparse
import json

import _common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    rows = []
    for run in range(parser.parse_args().runs):
        done = _common.secateur(
            "bench", "demo", "--against", "demo", "--data", "none", "--prompt-tokens", "64", "--new-tokens", "16",
            "--json", "--quiet",
        )  # fmt: skip
        (ratio,) = json.loads(done.stdout)["ratio"].values()
        widest = max(ratio, key=lambda name: abs(ratio[name]["median"] - 1))
        claimed = [name for name, found in ratio.items() if found["differs"]]
        rows.append({
            "run": run + 1, "quiet": not claimed, "claimed": ", ".join(claimed), "widest": widest,
            "ratio": ratio[widest]["median"], "seconds": done.seconds,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    quiet = sum(row["quiet"] for row in rows)
    print(f"{quiet} of {len(rows)} runs claim no difference")
    _common.store("noise", " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split()), rows, quiet=f"{quiet}/{len(rows)}")


if __name__ == "__main__":
    main()
