"""The model card of an export: what it was trained on, for what, how well it does, and what it is not.

It says what the run's files say and nothing else: the same run writes the same card.
"""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from gtalign_jax import __version__
from gtalign_jax.files import drafts
from gtalign_jax.game.pricing import STEP
from gtalign_jax.models.folders import CARD, CARD_MARK, is_ours

Config = Mapping[str, Any]
Summary = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
SHOWN = {
    "utility": "welfare W",
    "user_reward": "U",
    "llm_reward": "L",
    "answer_reward": "answer",
    "format_reward": "format",
    "n_tokens": "tokens",
}
_CHUNK = 1 << 20

_LIMITS = """\
- Welfare is what the reward's rules or the judge model say of an answer; people were not asked.
- The payoffs in `<payoff>` are the model's own forecast; nothing makes them true. Who edits them steers it.
- Refusals were trained where the data has harmful requests, and are no safeguard by themselves.
- The numbers hold for the held-out prompts of this data, with the sampling of the run."""

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
```

Steering by price: `python -m experiments.steer --model=FOLDER{step} --prompt=…`."""

_CHAIN = """\
It writes four blocks: `<thinking>`, a `<payoff>` matrix of what each outcome is worth to the LLM and to the
user, `<analyze>`, and the `<response>`, which is the answer."""


def write_card(folder: pathlib.Path, config: Config, summary: Summary | None) -> None:
    """Write README.md into an exported folder, unless one of somebody else's is there.

    config: the run's config.json. summary: its summary.json, where it is of this model.
    """
    path = folder / CARD
    if path.exists() and not is_ours(path):
        return
    weights = sorted(folder.glob("*.safetensors"), key=lambda file: file.name)
    sums = {file.name: _sha256(file) for file in weights}
    with drafts.file(path, "w", encoding="utf-8") as sink:
        sink.write(model_card(config, summary, sums))


def model_card(config: Config, summary: Summary | None, sums: Mapping[str, str]) -> str:
    """The card's text. sums: SHA-256 of each file of weights by name."""
    base = _base(config)
    data = ModelCardData(
        base_model=base or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gtalign"],
    )
    plain = config.get("features", {}).get("chain") == "plain"
    parts = [
        f"---\n{data.to_yaml()}\n---\n{CARD_MARK}",
        "# A model aligned on mutual welfare",
        "It answers without a chain." if plain else _CHAIN,
        "Training maximised what answers are worth to the user and to the LLM (GTAlign, arXiv 2510.08872), "
        f"by gtalign-jax {__version__}.",
        "## Training",
        "\n".join(_training(config, base)),
        "## Evaluation",
        _evaluation(summary) if summary else "This checkpoint was not evaluated by its run.",
        "## Limits",
        _LIMITS,
        "## Use",
        _USE.format(step=_step(config)),
        "## Files",
        "\n".join(f"- `{name}`: SHA-256 `{value}`" for name, value in sums.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _step(config: Config) -> str:
    """The flag of `experiments.steer` that a model needs which was taught to read no finer payoffs."""
    step = config.get("steer", {}).get("step", STEP)
    return "" if step == STEP else f" --step={step:g}"


def _base(config: Config) -> str:
    """The model that training began with, as the hub or a disk knows it; "" for one from nothing."""
    return pathlib.PurePath(str(config["start"].get("path") or "")).name


def _training(config: Config, base: str) -> list[str]:
    """The run in lines: start, data, cold start, alignment, reward."""
    data, sft, align, reward = (config[name] for name in ("data", "sft", "align", "reward"))
    optimizer = config.get("policy_optimizer", {})
    tasks = ", ".join(data["tasks"])
    epochs = sft.get("epochs", 0)
    steps = f"{epochs} passes over the demonstrations, in steps" if epochs else f"{sft['steps']} steps"
    lines = [
        f"- start: {base or 'from nothing'}",
        f"- data: `{data['source']}`, tasks {tasks}",
        f"- cold start: {steps} of {sft['prompts']} prompts",
        f"- alignment: `{align['algorithm']}`, {align['steps']} steps of {align['prompts']} prompts × "
        f"{align['group_size']} answers, learning rate {optimizer.get('lr', '?')}, seed {config['seed']}",
        f"- reward: `{reward['fn']}`"
        + (f", α = {reward['alpha']:g}" if reward["fn"].startswith("cobb_douglas") else ""),
        f"- judge: {config.get('judge', {}).get('model') or 'rules'}",
    ]
    if config.get("lora", {}).get("rank"):
        lines.append(f"- adapters of rank {config['lora']['rank']}, merged")
    return lines


def _evaluation(summary: Summary) -> str:
    """The held-out table of the last model, over all tasks and for each, with what the first one had in W."""
    first, last = next(iter(summary)), list(summary)[-1]
    lines = [
        f"Held-out prompts; means with 95 % bootstrap intervals over prompts. W before: that of `{first}`.",
        "",
        f"| task | W before | {' | '.join(SHOWN.values())} |",
        "|---" * (len(SHOWN) + 2) + "|",
    ]
    for task, found in summary[last].items():
        before = summary[first].get(task, {}).get("utility") if first != last else None
        cells = [_cell(before), *(_cell(found.get(name)) for name in SHOWN)]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(estimate: Mapping[str, float] | None) -> str:
    if not estimate:
        return "-"
    digits = 3 if abs(estimate["mean"]) < 10 else 1
    mean, lo, hi = (f"{estimate[name]:.{digits}f}" for name in ("mean", "lo", "hi"))
    return f"{mean} [{lo}, {hi}]"


def _sha256(path: pathlib.Path) -> str:
    """Of a file, read in flat memory."""
    found = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
