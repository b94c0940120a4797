"""What a run's data is like, as numbers: lengths, labels, repeated prompts, and what train and test share."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gtalign_jax.data.duplicates import near_duplicates
from gtalign_jax.data.item import Item
from gtalign_jax.data.loader import named
from gtalign_jax.data.sources import mark_seen, prompt_key

MAX_LABELS = 10  # more different truths are answers, not labels
MAX_NAMED = 20  # rows that are dropped, by name
Report = dict[str, Any]


class Written(NamedTuple):
    """A prompt as a run writes it: its tokens, and whether its history was cut."""

    tokens: int
    cut: bool = False


def split_report(
    items: Sequence[Item],
    prompts: Sequence[Written],
    buckets: Sequence[int],
    right_action: Callable[[Item], str],
) -> Report:
    """The numbers of one task's items in one split. prompts [rows]: of each item.

    labels: how often each truth stands (its part before ###), where those are few. repeated: prompts that
    stand in several rows, `turns` where the rows are turns of one conversation that were given the same
    prompt. buckets: rows that each holds, and those longer than it. cut: rows whose history is cut. dropped:
    those longer than all buckets; dropped_rows: where the first MAX_NAMED of them stand.
    """
    lengths = [prompt.tokens for prompt in prompts]
    dropped = [item for item, length in zip(items, lengths, strict=True) if length > buckets[-1]]
    labels = Counter(item.ground_truth.strip().partition("###")[0] for item in items)
    return {
        "rows": len(items),
        "prompts": len({prompt_key(item) for item in items}),
        "repeated": _repeated(items),
        "empty_truths": sum(not item.ground_truth.strip() for item in items),
        "labels": dict(labels.most_common()) if len(labels) <= MAX_LABELS else {},
        "right_actions": dict(Counter(map(right_action, items)).most_common()),
        "tokens": _lengths(lengths),
        "buckets": _buckets(lengths, buckets),
        "cut": sum(prompt.cut for prompt in prompts),
        "dropped": len(dropped),
        "dropped_rows": [item.where for item in dropped[:MAX_NAMED]],
    }


def leak_report(train: Sequence[Item], test: Sequence[Item]) -> Report:
    """What of the test split stands in the training split, in rows of the test split.

    rows, prompts: whose prompt stands there word for word. questions: further ones that ask a question which
    is asked there too, in other words before it. near: further ones whose prompt is nearly one from there.
    """
    marked = mark_seen(list(test), train)
    leaked = [item for item in marked if item.seen]
    asked = {item.intent for item in train}
    others = [item for item in marked if not item.seen and item.intent not in asked]
    near = near_duplicates([_text(item) for item in others], [_text(item) for item in train])
    return {
        "rows": len(leaked),
        "prompts": len({prompt_key(item) for item in leaked}),
        "questions": len(marked) - len(leaked) - len(others),
        "near": int(near.sum()),
    }


def _text(item: Item) -> str:
    return "\n".join(prompt_key(item))


def _repeated(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    """Prompts of several rows and how many rows these are, by why: turns of one conversation, or copies."""
    rows: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        rows[prompt_key(item)].append(item)
    kinds: dict[str, list[list[Item]]] = {"turns": [], "copies": []}
    for same in rows.values():
        if len(same) > 1:
            kinds["turns" if len({item.turn for item in same}) > 1 else "copies"].append(same)
    return {kind: {"prompts": len(found), "rows": sum(map(len, found))} for kind, found in kinds.items()}


def _lengths(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    low, half, most, high = np.percentile(lengths, [0, 50, 95, 100], method="higher")
    return {"min": int(low), "p50": int(half), "p95": int(most), "max": int(high)}


def _buckets(lengths: Sequence[int], buckets: Sequence[int]) -> dict[str, dict[str, int]]:
    """Bucket → rows that it is the smallest for, and longer ones, which it would drop if it were the last."""
    place = np.searchsorted(buckets, lengths)
    return {
        str(size): {"holds": int((place == i).sum()), "longer": int((place > i).sum())}
        for i, size in enumerate(buckets)
    }


def text_report(report: Mapping[str, Any]) -> str:
    """A report as lines for a terminal."""
    lines = [f"source {report['source']}, tokens of {report['tokenizer']}"]
    lines += [f"the chat template {sentence}" for sentence in report["template"]]
    for name, task in report["tasks"].items():
        lines += ["", name]
        for split, found in task["splits"].items():
            lines += [f"  {split:<6}{line}" for line in _split_lines(found)]
        lines += [f"  {line}" for line in _leak_lines(task)]
    for split, left_out in report["left_out"].items():
        if left_out:
            lines += ["", f"{split}: {left_out} records are empty or not for their task, and left out"]
    bad = report["bad"]
    if bad["rows"]:
        lines += ["", f"{bad['rows']} records cannot be read:", *(f"  {line}" for line in bad["lines"])]
    return "\n".join(lines)


def _split_lines(found: Mapping[str, Any]) -> list[str]:
    tokens = found["tokens"]
    sizes = ", ".join(f"{size}: {n['holds']:,}" for size, n in found["buckets"].items())
    lines = [
        f"{found['rows']:,} rows, {found['prompts']:,} prompts, {found['empty_truths']:,} empty truths",
        f"tokens: {tokens['min']:,} to {tokens['max']:,}, median {tokens['p50']:,}, 95 % {tokens['p95']:,}",
        f"rows by bucket: {sizes}; longer than all, so dropped: {found['dropped']:,}",
        f"right actions: {_counts(found['right_actions'])}",
    ]
    if found["cut"]:
        lines.append(f"{found['cut']:,} prompts lose their oldest turns to fit")
    if found["dropped"]:
        lines.append(f"dropped: {named(found['dropped_rows'], found['dropped'])}")
    if found["labels"]:
        lines.append(f"labels: {_counts(found['labels'])}")
    for kind, said in (("turns", "the turns of one conversation"), ("copies", "copies")):
        if (n := found["repeated"][kind])["prompts"]:
            lines.append(f"{n['prompts']:,} prompts stand in {n['rows']:,} rows: {said}")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or '(empty)'}: {n:,}" for name, n in counts.items())


def _leak_lines(task: Mapping[str, Any]) -> list[str]:
    found = task["leaks"]
    if found is None or not any(found.values()):
        return []
    rows = task["splits"]["test"]["rows"]
    return [
        f"of {rows:,} test rows, {found['rows']:,} ({found['prompts']:,} prompts) stand in train; "
        f"{found['questions']:,} more ask what is asked there; {found['near']:,} more are nearly there"
    ]
