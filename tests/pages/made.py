"""Made-up results, as the commands write them, with any text in every field that holds one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from secateur.bench_result import BenchResult, Quantities
from secateur.report_result import BrokenToken, Condition, Continued, Distribution, Examined, GroupLoss
from secateur.result import ConvertResult, Measured, PrunedMatrix, PruneResult, RecoverResult
from secateur.study_result import StudyResult, Trial

HOSTILE = "</script><img src=x onerror=alert(1)>\"'`&{{7*7}}|<!--]]>\x00\x1b[31m\ud800"
PROTOCOL = {"quality": {"perplexity": "some text; 12 windows"}}
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def sizes(perplexity: float | None = 12.0, sparsity: float = 0.0, **changes: Any) -> Measured:
    values = {
        "parameters": 1000, "nonzero": round(1000 * (1 - sparsity)), "sparsity": sparsity, "bytes_disk": 4_000_000,
        "dtype": "float32", "perplexity": perplexity, "decode_tokens_per_second": 20.0,
    }  # fmt: skip
    return Measured(**{**values, **changes})


def pruning(blocks: int = 4, *, text: str = "", **changes: Any) -> PruneResult:
    """A result of `prune`; ``text`` is added to everything that is a text."""
    draw = random.Random(blocks)
    matrices = [
        PrunedMatrix(f"model.layers.{b}.{kind}{text}.weight", [8, 8], 32, draw.uniform(0.3, 0.7), draw.uniform(1, 5))
        for b in range(blocks)
        for kind in KINDS
    ]  # fmt: skip
    values = {
        "recipe": {"method": f"wanda{text}", "sparsity": 0.5, "structure": [], "method_options": {}},
        "out": f"out{text}",
        "source": {"name": f"base{text}", "model": f"base{text}", "sha256": "abc", "kind": "folder"}, "sparsity": 0.5,
        "seconds": 3.0, "peak_rss_bytes": 10**8, "before": sizes(), "after": sizes(17.0, 0.5), "verified": True,
        "verdict": [f"Quality is worse.{text}"], "protocol": PROTOCOL, "matrices": matrices,
        "warnings": [f"careful{text}"] if text else [], "versions": {"torch": f"2{text}"},
    }  # fmt: skip
    return PruneResult(**{**values, **changes})


def conversion(**changes: Any) -> ConvertResult:
    values = {
        "out": "c", "source": {"name": "base", "model": "base", "sha256": "abc", "kind": "folder"},
        "conversion": "factorized", "options": {"cores": 2, "rank": 8}, "models": [], "seconds": 3.0,
        "peak_rss_bytes": 10**8, "before": sizes(), "after": sizes(13.0, bytes_disk=3_000_000), "verified": True,
        "protocol": PROTOCOL,
    }  # fmt: skip
    return ConvertResult(**{**values, **changes})


def recovery(**changes: Any) -> RecoverResult:
    values = {
        "out": "r", "source": {"name": "base", "model": "base", "sha256": "abc"}, "student": {"model": "pruned"},
        "settings": {"tokens": 4096, "mode": "full"}, "sparsity": 0.5, "seconds": 60.0, "peak_rss_bytes": 10**8,
        "before": sizes(17.0, 0.5), "after": sizes(14.0, 0.5), "teacher": sizes(), "verified": True,
        "protocol": PROTOCOL,
    }  # fmt: skip
    return RecoverResult(**{**values, **changes})


def study(count: int = 12, *, text: str = "", blocks: int = 2, **changes: Any) -> StudyResult:
    draw = random.Random(count)
    found = []
    for number in range(count):
        sparsity = draw.uniform(0.1, 0.8)
        method = draw.choice(["random", "magnitude", "wanda", "sparsegpt"])
        badness = {"random": 6, "magnitude": 3, "wanda": 1.3, "sparsegpt": 1}[method]
        structure = draw.choice([None, None, "ffn", "depth"])
        share = 1 - 0.6 * sparsity if structure else 1.0
        perplexity = 12 * (1 + badness * (sparsity * (2 if structure else 1)) ** 3) * draw.uniform(0.97, 1.05)
        values: dict[str, float | None] = {
            "perplexity": perplexity, "bytes_disk": 538e6 * share, "sparsity": 0 if structure else sparsity,
            "decode_tokens_per_second": 20 / share * draw.uniform(0.96, 1.04), "flops_per_token": 2.7e8 * share,
            "joules_per_token": None, "seconds": draw.uniform(20, 90),
        }  # fmt: skip
        zeros = {
            f"model.layers.{b}.{k}{text}.weight": sparsity * draw.uniform(0.8, 1.2)
            for b in range(blocks)
            for k in KINDS
        }
        settings = {"method": method + text, "sparsity": round(sparsity, 2), "structure": structure}
        command = f"secateur prune demo -o trial-{number} --method {method}{text} --sparsity {sparsity:.2f}"
        found.append(Trial(number, "complete", settings, command, values, sparsity > 0.15, sparsity=zeros))
    base = {"bytes_disk": 538e6, "decode_tokens_per_second": 20.0, "flops_per_token": 2.7e8}
    baselines = [
        Trial(-1, "complete", {}, "", {**base, "perplexity": 11.6}, name="dense"),
        Trial(-2, "complete", {}, "", {**base, "perplexity": 11.7, "bytes_disk": 165e6}, name=f"int8{text}"),
        Trial(-3, "complete", {}, "", {**base, "perplexity": 13.1, "bytes_disk": 98e6}, name="4-bit"),
    ]  # fmt: skip
    best = min(
        found, key=lambda t: abs((t.values["bytes_disk"] or 0) / 538e6 - 0.8) + (t.values["perplexity"] or 0) / 40
    )
    failed = Trial(count, "failed", {"method": f"alps{text}"}, "", reason=f"out of memory{text}")
    values = {
        "name": f"paper{text}", "model": "demo", "objectives": {"perplexity": "minimize", "bytes_disk": "minimize"},
        "constraints": [f"bytes_disk <= 500MB{text}"], "data": {"choice": f"builtin{text}", "test": "wikitext"},
        "finished": True, "baselines": baselines, "trials": [*found, failed], "recommended": best.number,
        "finalists": [Trial(best.number, "complete", best.settings, best.command, {"perplexity": 15.0})],
        "importances": {f"perplexity{text}": {"sparsity": 0.7, f"method{text}": 0.3}},
        "machine": {"processor": f"x86{text}"},
    }  # fmt: skip
    return StudyResult(**{**values, **changes})


def bench(name: str = "pruned", against: tuple[str, ...] = ("base",), *, text: str = "") -> BenchResult:
    numbers = {"parameters": 1000, "nonzero": 500, "bytes_disk": 4_000_000, "flops_per_token": 2e6,
               "decode_tokens_per_second": 21.0, "perplexity": 17.0}  # fmt: skip
    others = [
        Quantities(one, "transformers", kind, **{**numbers, "nonzero": 1000, "perplexity": ppl, "bytes_disk": size})
        for one in against for kind, ppl, size in (("float32", 12.0, 4_000_000), ("int8", 12.2, 1_000_000))
    ]  # fmt: skip
    missing = {"joules_per_token": f"no meter on this machine{text}"}
    return BenchResult(
        name, "transformers", "float32", **numbers, missing=missing, against=others, verdict=[f"same{text}"]
    )


def spread(quantity: str, condition: str) -> Distribution:
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    edges = [40 + 1.5 * i for i in range(41)]
    bell = [round(60 * 2.7 ** -((i - 18) ** 2 / 60)) for i in range(40)]
    return Distribution(quantity, condition, levels, [50.0, 60, 67, 74, 88], [54.0, 63, 70, 77, 90], [-2.0, 1, 3, 5, 9],
                        edges, bell, [0, 0, *bell[:-2]])  # type: ignore[arg-type]  # fmt: skip


def examined(model: str, source: str = "base", *, text: str = "") -> Examined:
    groups = [GroupLoss(label, 900 - 200 * i, 1 + i, 1.3 + 1.2 * i, 0.3 + 0.2 * i, 0.05, 0.06, 0.02)
              for i, label in enumerate(("1-10", "11-100", "101-1,000", "1,001-10,000"))]  # fmt: skip
    places = [
        GroupLoss(str(2**i), 2**i, 5 - i / 2, 5.5 - i / 3, 0.5 + i / 6, None if not i else 1 / 2**i) for i in range(9)
    ]
    rows = [Condition("clean", 2044, 2.5, 2.9, 0.01, 0.5, 0.44, 0.09, 0.03, -0.02, 0.42)]
    rows += [Condition(name, 1000, 3.5, 4.1, 0.02, 0.4, 0.35, 0.08, 0.03, -0.01, 0.61, 700, 0.4 + i / 5, 0.5 + i / 4)
             for i, name in enumerate(("typos", "case", "dropped"))]  # fmt: skip
    broken = [
        BrokenToken("typos", f"the words\nbefore{text}", f" it{text}", f" other{text}", 4.0, -7.0, 9.0, -0.1, 8.0)
    ] * 15
    spreads = [spread(q, c.name) for c in rows for q in ("angle", "length", "margin")]
    told = [Continued(f"Once upon{text}", f"a time there was{text}", f"a the the the{text}")]
    return Examined(
        model, source, "", f"builtin text{text}", groups, places, spreads, rows, broken, [f"why{text}"], told
    )


def write(path: Path, result: Any) -> Path:
    """A result where its command would leave it: a folder for prune and recover, a file for the others."""
    if isinstance(result, PruneResult | RecoverResult | ConvertResult):
        path.mkdir(parents=True, exist_ok=True)
        (path / "secateur.json").write_text(json.dumps(result.to_dict()), encoding="utf-8")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.to_json(), encoding="utf-8")
    return path
