"""Handle tensors that only one of two checkpoints has, if their meaning is clear: other names, copies, buffers.

Versions of transformers name and stack a model's tensors differently on disk. Some libraries save the head of a model
that ties it to its embeddings, others do not; the same holds for buffers that a model computes anyway, such as rotary
frequencies and causal masks.
"""

from __future__ import annotations

from backmerge.checkpoints.files import BLOCK, SafetensorsFile, TensorInfo, num_bytes
from backmerge.checkpoints.layout import Place, layout_of
from backmerge.checkpoints.reader import Checkpoint, Weights, read_json
from backmerge.errors import CheckpointError, MergeError

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def settle_one_sided(tuned: Checkpoint, base: Weights) -> None:
    """Give a tuned checkpoint the tensors that its base has, as far as the difference has no effect.

    `check_same_shape` reports any difference that remains.

    Args:
        tuned: A checkpoint that was just opened; changed in place.
        base: The model that it was tuned from.

    Raises:
        MergeError: only one of the two ties its embeddings.
    """
    if tuned.infos.keys() == base.infos.keys():
        return
    if tuned.infos.keys() - base.infos.keys() and base.infos.keys() - tuned.infos.keys():
        _name_alike(tuned, base)
    for name in [name for name in tuned.infos.keys() ^ base.infos.keys() if name.endswith(HEAD)]:
        if name in tuned.infos:
            _leave_out_head(name, tuned, base)
        else:
            _copy_head(name, tuned, base)
    extra, missing = tuned.infos.keys() - base.infos.keys(), base.infos.keys() - tuned.infos.keys()
    if extra:
        tuned.leave_out(extra & _ignored(tuned))
    if missing:
        for name in sorted(missing & _ignored(base)):
            tuned.add(name, base.infos[name])


def _name_alike(tuned: Checkpoint, base: Weights) -> None:
    """Give a tuned model's tensors the base's names if both are the same parameter in memory.

    If only the tuned model stacks its experts in one tensor, each expert becomes a range of that tensor's bytes.
    """
    try:
        ours, theirs = layout_of(base), layout_of(tuned)
    except CheckpointError:
        return  # the architecture is unknown: the difference is reported
    by_place = {place: name for name, place in theirs.places.items()}
    used = set()
    for name in sorted(base.infos.keys() - tuned.infos.keys()):
        place = ours.places.get(name)
        if place is None or place.parameter not in theirs.on_disk:
            continue
        source = by_place.get(place) or by_place.get(Place(place.parameter))
        if source is None:
            raise MergeError(
                f"the tuned model {tuned.directory} and the base {base.directory} store a parameter in different "
                f"ways: '{name}' is {len(theirs.on_disk[place.parameter])} tensors in the tuned model, such as "
                f"'{theirs.on_disk[place.parameter][0]}'",
                remedy="save the tuned model like the base: load it with transformers, and save it with "
                "save_pretrained(DIR, save_original_format=False).",
            )
        info, region = tuned.infos[source], place.region
        if source == by_place.get(place) or region is None:
            tuned.add(name, info)
        else:
            row = num_bytes(source, info) // (region.num_experts * region.height)
            begin = info.offset + (region.first * region.height + region.start) * row
            tuned.add(name, TensorInfo((region.rows, info.shape[-1]), info.dtype, info.file, begin, region.rows * row))
        used.add(source)
    tuned.leave_out(used - base.infos.keys())


def _leave_out_head(name: str, tuned: Checkpoint, base: Weights) -> None:
    embedding = _embedding(tuned)
    if embedding is None or _tied(base) is False:
        return
    if not has_same_values(tuned, name, tuned, embedding):
        raise MergeError(
            f"the tuned model {tuned.directory} has its own head: its '{name}' differs from its '{embedding}', "
            f"but the base {base.directory} ties the two, so it has no head to merge with",
            remedy="untie the base first: load it, set config.tie_word_embeddings = False, make lm_head.weight a copy "
            "of the embeddings, save it, and give that as BASE.",
        )
    if _tied(tuned) is False:
        raise MergeError(
            f"the tuned model {tuned.directory} says in its config.json that its embeddings are not tied, but the base "
            f"{base.directory} ties them; its '{name}' is a plain copy of its '{embedding}'",
            remedy=f'write "tie_word_embeddings": true into {tuned.directory / "config.json"}.',
        )
    tuned.leave_out({name})


def _copy_head(name: str, tuned: Checkpoint, base: Weights) -> None:
    embedding, of_base = _embedding(tuned), _embedding(base)
    if embedding is None or of_base is None:
        return
    if _tied(tuned) is False:
        raise MergeError(
            f"the tuned model {tuned.directory} says in its config.json that its embeddings are not tied, but has no "
            f"'{name}': its head would be random numbers",
            remedy='save it again; or, if its base ties them, write "tie_word_embeddings": true into that file.',
        )
    if not has_same_values(base, name, base, of_base):
        raise MergeError(
            f"the base {base.directory} has its own head: its '{name}' differs from its '{of_base}', but the "
            f"tuned model {tuned.directory} ties the two, so it has no head to merge with",
            remedy="untie the tuned model first: load it, set config.tie_word_embeddings = False, make lm_head.weight "
            "a copy of the embeddings, save it, and give that as TUNED.",
        )
    tuned.add(name, tuned.infos[embedding])


def _embedding(weights: Weights) -> str | None:
    found = [name for name in weights.infos if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _tied(weights: Weights) -> bool | None:
    """Return whether the config says that embeddings are tied; `None` if it does not say."""
    config = read_json(weights.companions / "config.json")
    text = config.get("text_config")
    found = [values.get("tie_word_embeddings") for values in (config, text) if isinstance(values, dict)]
    return next((value for value in found if isinstance(value, bool)), None)


def has_same_values(one: Weights | SafetensorsFile, name: str, other: Weights | SafetensorsFile, its: str) -> bool:
    """Return whether two tensors have the same shape and values; read in blocks, up to the first difference.

    one: The model or file with the first.
    name: The first's name.
    other: The model or file with the second.
    its: The second's name.
        its: The second's name.
    """
    info = one.infos[name]
    if info.shape != other.infos[its].shape:
        return False
    for start in range(0, info.num_elements, BLOCK):
        stop = min(start + BLOCK, info.num_elements)
        if not bool((one.block(name, start, stop) == other.block(its, start, stop)).all()):
            return False
    return True


def _ignored(weights: Weights) -> frozenset[str]:
    """Return the tensors that transformers does not load, since the model computes them."""
    try:
        return layout_of(weights).ignored
    except CheckpointError:
        return frozenset()  # the architecture is unknown: the difference is reported
