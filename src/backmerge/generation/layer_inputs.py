"""Gather the inputs of a model's linear layers on conversations, with hooks, in one forward pass for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from backmerge.checkpoints.layout import layout_of
from backmerge.checkpoints.reader import Weights
from backmerge.errors import GenerationError
from backmerge.generation.chat import max_positions, prompt_text, prompt_tokens, render
from backmerge.generation.protocol import Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.inputs import GatheredLayer
from backmerge.merging.recipe import Variant
from backmerge.merging.second_moments import SecondMoments
from backmerge.progress import Advance
from backmerge.records import Example, Message

MARK = "qxzuserqxz"  # replaces a user's text: plain letters, which no template changes
OWN_TOKENS = 64  # length of a prompt that the model writes


def own_prompts(engine: TransformersEngine, variant: Variant, num_prompts: int, seed: int) -> tuple[Example, ...]:
    """Return prompts written by the model: its output for the user's turn of its chat template, drawn with a seed.

    Empty and repeated ones are dropped, and those that fill the model's context.

    Raises:
        GenerationError: it writes no prompt.

    Source: Xu et al., Magpie (arXiv 2406.08464).
    """
    model, tokenizer = engine.loaded(variant)
    beginning, _, _ = render(tokenizer, [Message("user", MARK)]).partition(MARK)
    example = Example("own", (Message("user", beginning),), is_raw=True)
    drawn = Sampling(temperature=1.0, seed=seed, num_samples=num_prompts, max_new_tokens=OWN_TOKENS)
    texts = [one.text.strip() for one in engine.generate(variant, [example], drawn, lambda *_: None)]
    written = list(dict.fromkeys(filter(None, texts)))
    prompts = tuple(Example(f"own-{i}", (Message("user", text),)) for i, text in enumerate(written))
    context = max_positions(model)
    if context is not None:  # text that no tokenizer would write can have more tokens than were generated
        prompts = tuple(p for p in prompts if len(prompt_tokens(tokenizer, p, prompt_text(tokenizer, p))) < context)
    if not prompts:
        raise GenerationError(
            f"the model {variant.base.directory} wrote no prompt into its chat template's user turn",
            remedy="give prompts instead: --guard with a benchmark or a file.",
        )
    return prompts


def answers_to(
    engine: TransformersEngine,
    variant: Variant,
    prompts: Sequence[Example],
    max_new_tokens: int,
    advance: Advance,
) -> list[str]:
    """Return a model's own greedy answers; empty ones if the limit is 0 tokens."""
    if max_new_tokens == 0:
        advance(len(prompts))
        return [""] * len(prompts)
    found = engine.generate(variant, prompts, Sampling(max_new_tokens=max_new_tokens), advance)
    return [one.text for one in found]


def gather_inputs(
    engine: TransformersEngine,
    variant: Variant,
    conversations: Sequence[tuple[Example, str]],
    max_directions: int,
    advance: Advance,
) -> tuple[dict[str, GatheredLayer], int]:
    """Return second moments of each linear layer's inputs, by its first weight's name on disk, and the token count.

    Conversations are run one at a time, unpadded, in their order: the result is the same on each run. Every token
    counts. Layers that get the same tensor as the one before (q, k and v; gate and up) are counted once. The head is
    omitted, and so are layers that the forward pass does not call as modules, such as stacked experts.

    Args:
        engine: Loads the model.
        variant: The model.
        conversations: Prompts with their answers.
        max_directions: Number of directions to keep for each layer.
        advance: Progress callback, with the number of finished conversations.

    Raises:
        GenerationError: no layer was found.
    """
    model, tokenizer = engine.loaded(variant)
    layers = _Layers(model, variant.base, max_directions)
    context = max_positions(model)
    thinking = engine.settings.thinking
    num_tokens = 0
    with layers.watched(), torch.inference_mode():
        for example, answer in conversations:
            asked = prompt_text(tokenizer, example, thinking=thinking)
            ids = prompt_tokens(tokenizer, example, asked)
            rest = answer.removeprefix(example.prefill)
            ids += tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
            ids = ids[:context]  # the model reads no more
            num_tokens += len(ids)
            try:
                model(input_ids=torch.tensor([ids], device=engine.device), use_cache=False)
            except torch.OutOfMemoryError as error:
                raise GenerationError(
                    f"the second moments of the layers' inputs do not fit in the memory of {engine.device}",
                    remedy="use another --device, or keep fewer directions (max_directions in an experiment file).",
                ) from error
            advance(1)
    found = layers.found()
    if not found:
        raise GenerationError(
            f"no linear layer was found in {variant.base.directory}",
            remedy="this architecture stores its weights in another form; merge it with --method linear.",
        )
    return found, num_tokens


class _Layers:
    """The linear layers of a model, and the inputs seen so far.

    Args:
        model: A model of transformers.
        base: Its weights; names are those on disk.
        max_directions: Number of directions to keep for each layer.
    """

    def __init__(self, model: Any, base: Weights, max_directions: int) -> None:
        self._max_directions = max_directions
        self._modules: dict[str, nn.Module] = {}
        self._moments: dict[str, SecondMoments] = {}
        self._same_as: dict[str, str] = {}
        self._last: tuple[str, Any] = ("", None)
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is not head and (isinstance(module, nn.Linear) or _is_conv1d(module)):
                self._modules[name] = module
        self._on_disk = _names_on_disk([f"{name}.weight" for name in self._modules], base)

    def watched(self) -> ExitStack:
        """Return a context in which the layers' inputs are recorded."""
        stack = ExitStack()
        for name, module in self._modules.items():
            if self._on_disk.get(f"{name}.weight"):
                stack.callback(module.register_forward_pre_hook(self._hook(name)).remove)
        return stack

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, given: tuple[Any, ...]) -> None:
            if not given:  # called by keyword, which no supported architecture does
                return
            inputs = given[0]
            before, tensor = self._last
            if name not in self._same_as and name not in self._moments and inputs is tensor:
                self._same_as[name] = self._same_as.get(before, before)
            self._last = (name, inputs)
            if name in self._same_as:
                return
            if name not in self._moments:
                self._moments[name] = SecondMoments(inputs.shape[-1], self._max_directions)
            self._moments[name].add(inputs.reshape(-1, inputs.shape[-1]))

        return take

    def found(self) -> dict[str, GatheredLayer]:
        """Return the moments, in the order in which the layers were called."""
        self._last = ("", None)
        return dict(self._found())

    def _found(self) -> Iterator[tuple[str, GatheredLayer]]:
        for name in list(self._moments):
            users = [name, *(other for other, first in self._same_as.items() if first == name)]
            tensors = tuple(place for user in users for place in self._on_disk[f"{user}.weight"])
            inputs = self._moments.pop(name).found()  # frees its rows
            yield tensors[0], GatheredLayer(tensors, replace(inputs, is_transposed=_is_conv1d(self._modules[name])))


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _names_on_disk(parameters: Sequence[str], base: Weights) -> Mapping[str, Sequence[str]]:
    """Return the matrices on disk that make up each parameter; empty for those with an unknown layout."""
    if all(name in base.infos for name in parameters):
        return {name: [name] for name in parameters}
    layout = layout_of(base)
    return {
        name: [place for place in layout.on_disk.get(name, ()) if len(base.infos[place].shape) == 2]
        for name in parameters
    }
