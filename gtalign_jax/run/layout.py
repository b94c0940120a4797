"""The layout of a checkpoint: which tree stands for a train state on disk, from one version to the next."""

from gtalign_jax.types import Completions, PyTree, TrainState

_OPTIONAL = ("kl_coef", "reference", "waiting")
# Names in a checkpoint of what `Completions` holds; runs that are older than `Completions` wrote these.
_WAITING = {"completion": "tokens", "sampler_logp": "logp"} | {
    name: name for name in ("length", "finished", "action_mask")
}


def stored(state: TrainState) -> dict[str, PyTree]:
    """The tree that a checkpoint holds: optional parts stand in it when the state has any of them."""
    tree = {name: getattr(state, name) for name in ("policy", "critic", "step", "rng")}
    optional = {name: getattr(state, name) for name in _OPTIONAL}
    if state.waiting is not None:
        optional["waiting"] = {name: getattr(state.waiting, field) for name, field in _WAITING.items()}
    return tree | optional if any(part is not None for part in optional.values()) else tree


def restored(tree: dict[str, PyTree]) -> TrainState:
    """The state that `stored` made this tree of."""
    waiting = tree.get("waiting")
    if waiting is not None:
        fields = {field: waiting[name] for name, field in _WAITING.items()}
        waiting = Completions(
            fields["tokens"], fields["length"], fields["finished"], fields["logp"], fields["action_mask"]
        )
    return TrainState(
        policy=tree["policy"],
        critic=tree["critic"],
        step=tree["step"],
        rng=tree["rng"],
        kl_coef=tree.get("kl_coef"),
        reference=tree.get("reference"),
        waiting=waiting,
    )
