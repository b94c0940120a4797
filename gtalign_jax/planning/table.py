"""A plan as text: the tables, and which knob to turn."""

from typing import Any

from gtalign_jax.planning.cost import COLLECTIVES


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a text table (also valid Markdown)."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    lines = [
        f"{plan['model']} ({plan['parameters'] / 1e9:.2f}B parameters) on {plan['topology']}: "
        f"{plan['chips']} {plan['chip']} chips of {plan['hbm_gib']:.2f} GiB, mesh {mesh or 'of one chip'}",
        *(
            ["chosen: " + ", ".join(f"{k}={v}" for k, v in plan["chosen"].items())]
            if "chosen" in plan
            else []
        ),
        "",
        "| program | arguments GiB | temporaries GiB | resident GiB | HBM GiB | fits | TFLOP | traffic GB "
        "| matmul s | memory s | network s | bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in plan["programs"]:
        if not row["compiled"]:
            lines.append(
                f"| {row['name']} | | | {row['resident_gib']:.2f} | {row['hbm_gib']:.2f} | no |" + " |" * 6
            )
            continue
        sizes = (f"{row[k]:.2f}" for k in ("argument_gib", "temporary_gib", "resident_gib", "hbm_gib"))
        fits = "yes" if row["fits"] else "no"
        if "seconds" not in row:
            lines.append(f"| {row['name']} | {' | '.join(sizes)} | {fits} |" + " |" * 6)
            continue
        times = (f"{row[k]:.2f}" for k in ("matmul_s", "memory_s", "network_s"))
        cells = [row["name"], *sizes, fits, f"{row['tflops']:.0f}", f"{row['traffic_gb']:.0f}", *times]
        lines.append(f"| {' | '.join(cells)} | {row['bound']} |")
    lines += ["", *_collective_table(plan), ""]
    if plan["step"]:
        step = plan["step"]
        lines.append(
            f"one alignment step: at least {step['seconds']:.1f} s, at most "
            f"{step['tokens_per_s']:.0f} completion tokens/s, MFU at most {100 * step['mfu_bound']:.0f} %"
        )
    lines.append(f"verdict: {'fits' if plan['fits'] else 'does not fit'}")
    return "\n".join([*lines, *plan["advice"]])


def _collective_table(plan: dict[str, Any]) -> list[str]:
    lines = ["| collectives (executions, GB a chip) | " + " | ".join(COLLECTIVES) + " |"]
    lines.append("|---" * (1 + len(COLLECTIVES)) + "|")
    for row in plan["programs"]:
        if "collectives" in row:
            found = (row["collectives"].get(kind) for kind in COLLECTIVES)
            cells = (f"{c['count']:.0f}, {c['gb']:.1f}" if c else "" for c in found)
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def advice(plan: dict[str, Any]) -> list[str]:
    """Which knob to turn, one line each: for programs that do not fit, then for the slowest."""
    lines = []
    for row in plan["programs"]:
        if not row["fits"]:
            lines.append(f"{row['name']}: {row['hbm_gib']:.1f} GiB of {plan['hbm_gib']:.2f}; {_knob(row)}")
    slowest = max((r for r in plan["programs"] if "seconds" in r), key=lambda r: r["seconds"], default=None)
    if slowest is not None and slowest["bound"] == "network":
        worst = slowest["largest_collective"]
        lines.append(
            f"{slowest['name']} waits for the network: {worst['kind']} {worst['shape']} x "
            f"{worst['times']:.0f} ({worst['from']}) alone takes {worst['seconds']:.2f} s; a larger "
            "mesh.tensor shrinks the weights each chip gathers"
        )
    return lines


def _knob(row: dict[str, Any]) -> str:
    if row["name"] == "sft":
        return "raise sft.microbatches, or split more with mesh.tensor or mesh.context"
    if row["name"].startswith("rollout"):
        return "lower align.prompts or max_new_tokens, or split the caches over more chips (mesh.fsdp)"
    if row["name"] == "experience":
        return "lower align.prompts, or split more with mesh.tensor or mesh.context"
    if " part" in row["name"]:
        return "lower algorithm.microbatch_tokens, set start.remat=full, or split more with mesh.tensor"
    return (
        "raise algorithm.microbatches, set start.remat=full, or split more with mesh.tensor or mesh.context"
    )
