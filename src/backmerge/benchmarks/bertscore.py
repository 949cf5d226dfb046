"""BERTScore: how well an answer's tokens match a reference's, by an encoder's embeddings; our own implementation.

With x the candidate's tokens and y the reference's, as unit vectors from one layer of the encoder:

    precision = mean over i of max over j of xᵢ·yⱼ,   recall = mean over j of max over i of xᵢ·yⱼ,   F1 = 2PR / (P + R)

Special tokens are not in the means, but can be the best match. There are no weights by rarity (idf) and no rescaling.
The figures equal those of bert-score 0.3.13, pair by pair. Differences:

- under transformers 5 bert-score fails on tokenizers without a limit (DeBERTa's) and on empty texts, and RoBERTa's
  tokenizer no longer gets the leading space that it needs; here it does, as before;
- if a token's best cosine is negative, bert-score uses 0 for it if the batch is padded, and we never do;
- a model with a norm after its last layer (ModernBERT) gives the layer's own output, without that norm.

Source: Zhang et al., BERTScore (arXiv 1904.09675), equations 1 to 3, without idf.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from backmerge.checkpoints.files import fingerprint_of_files
from backmerge.checkpoints.locate import locate_model
from backmerge.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "microsoft/deberta-xlarge-mnli"
# layers that correlate best with human judgements on WMT16: a few from bert-score's table (`model2layers`, MIT)
LAYERS = {
    "bert-base-multilingual-cased": 9, "bert-base-uncased": 9, "bert-large-uncased": 18, "deberta-base-mnli": 9,
    "deberta-large-mnli": 18, "deberta-v3-base": 9, "deberta-v3-large": 12, "deberta-xlarge-mnli": 40,
    "distilbert-base-uncased": 5, "roberta-base": 10, "roberta-large": 17, "roberta-large-mnli": 19,
    "xlm-roberta-base": 9, "xlm-roberta-large": 17,
}  # fmt: skip
# the main branch of these has only a pickle, which is not read; the hub's converter wrote the same as safetensors
SAFE_REVISIONS = {DEFAULT_MODEL: "refs/pr/6"}

MAX_TOKENS = 512
# these models recognise a word by the space before it
SPACED_TOKENIZERS = ("GPT2Tokenizer", "RobertaTokenizer")
# embeddings are kept for this many batches of pairs at once: longer windows pad less, but need more memory
BATCHES_IN_WINDOW = 8


Item = TypeVar("Item")


class BertScore(NamedTuple):
    """Precision, recall and F1 of one pair, each in [0, 1]; 0 if either text has no tokens."""

    precision: float
    recall: float
    f1: float


class Embedding(NamedTuple):
    """A text's tokens as unit vectors (tokens, hidden size), and which of them are not special tokens (tokens,)."""

    vectors: Tensor
    counts: Tensor


NO_SCORE = BertScore(0.0, 0.0, 0.0)


def score_of(candidate: Embedding, reference: Embedding) -> BertScore:
    """Return the score of one pair; all 0 if either has no token that counts, as in bert-score.

    Rounding can give a value above 1 for equal texts, and a mean below 0 is possible though no real encoder gives one:
    both are replaced by the bound, since a score is a share.
    """
    if not (candidate.counts.any() and reference.counts.any()):
        return NO_SCORE
    similarity = candidate.vectors @ reference.vectors.T
    precision = similarity.amax(dim=1)[candidate.counts].mean().clamp(0, 1).item()
    recall = similarity.amax(dim=0)[reference.counts].mean().clamp(0, 1).item()
    both = precision + recall
    return BertScore(precision, recall, 2 * precision * recall / both if both else 0.0)


class BertScorer:
    """BERTScore with one layer of one encoder, which is loaded when it is first used.

    Args:
        model: A folder or a hub id, with safetensors; code that comes with it is not run.
        layer: The layer whose output is the embedding: 0 is the input embeddings, 1 the first layer. By default from a
            table, by the model's name; it has the default model (40) and a few others.
        device: A name in torch; "auto" uses a GPU if there is one.
        batch_size: Number of texts that are embedded at once.

    Raises:
        ConfigError: no layer was given, and the table does not have the model.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, layer: int | None = None, *, device: str = "auto", batch_size: int = 32
    ) -> None:
        name = Path(model.partition("@")[0]).name
        known = LAYERS.get(name) if layer is None else layer
        if known is None:
            raise ConfigError(
                f"BERTScore with '{model}' needs a layer: the layer that correlates best with human ratings is known "
                f"only for {', '.join(sorted(LAYERS))}",
                remedy="give `layer`: about two thirds up is usual; 0 is the input embeddings.",
            )
        self.model, self.layer, self.device, self.batch_size = model, known, device, batch_size
        self._encoder: _Encoder | None = None

    @functools.cached_property
    def identity(self) -> str:
        """What determines the scores: model (a folder by its files' content, else the hub id), layer and versions.

        No model is loaded or downloaded for it.
        """
        import torch
        import transformers

        name = self.model
        if Path(name).expanduser().is_dir():
            folder = locate_model(name)
            files = {file for file in folder.iterdir() if file.suffix in {".json", ".txt", ".model", ".safetensors"}}
            name = f"{folder.name}#{fingerprint_of_files(files)}"
        elif name in SAFE_REVISIONS:
            name = f"{name}@{SAFE_REVISIONS[name]}"
        versions = f"transformers-{transformers.__version__}/torch-{torch.__version__.partition('+')[0]}"
        return f"bertscore/1/{name}/layer-{self.layer}/{versions}"

    def scores(
        self,
        candidates: Sequence[str],
        references: Sequence[str],
        advance: Callable[[int], None] | None = None,
    ) -> list[BertScore]:
        """Return the score of each candidate with the reference in the same place.

        Texts are stripped, and cut after 512 tokens (fewer if the model allows fewer). An empty one scores 0. Equal
        texts are embedded once.

        Args:
            candidates: Answers.
            references: One for each candidate.
            advance: Called with the number of pairs that were scored since the last call.

        Raises:
            CheckpointError: the model cannot be found or read.
            ConfigError: the model has no such layer, or there is no such device.
        """
        pairs = [(c.strip(), r.strip()) for c, r in zip(candidates, references, strict=True)]
        if not pairs:
            return []
        if self._encoder is None:
            self._encoder = _Encoder(locate_model(_with_safe_revision(self.model)), self.layer, self.device)
        tokens = self._encoder.tokens(sorted({text for pair in pairs for text in pair}))
        found: dict[int, BertScore] = {}
        for i, score in self._scored(self._encoder, pairs, tokens):
            found[i] = score
            if advance is not None:
                advance(1)
        return [found[i] for i in range(len(pairs))]

    def release(self) -> None:
        """Free the model's memory; the next call loads it again."""
        import torch

        self._encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _scored(
        self, encoder: _Encoder, pairs: Sequence[tuple[str, str]], tokens: Mapping[str, list[int]]
    ) -> Iterator[tuple[int, BertScore]]:
        """Yield place and score of each pair; pairs with the same reference are together, to keep few embeddings."""
        uses = Counter(text for pair in pairs for text in pair)
        kept: dict[str, Embedding] = {}
        order = sorted(range(len(pairs)), key=lambda i: (len(tokens[pairs[i][1]]), pairs[i][1], pairs[i][0]))
        for window in _cut_up(order, self.batch_size * BATCHES_IN_WINDOW):
            wanted = {text for i in window for text in pairs[i]} - kept.keys()
            pending = window
            # the empty batch is for pairs whose texts were all kept from the previous window
            for batch in [[], *_cut_up(sorted(wanted, key=lambda text: (len(tokens[text]), text)), self.batch_size)]:
                kept.update(zip(batch, encoder.embeddings([tokens[text] for text in batch]), strict=True))
                waiting = []
                for i in pending:
                    if all(text in kept for text in pairs[i]):
                        yield i, score_of(*(kept[text] for text in pairs[i]))
                    else:
                        waiting.append(i)
                pending = waiting
            uses.subtract(text for i in window for text in pairs[i])
            kept = {text: embedding for text, embedding in kept.items() if uses[text]}


def _cut_up(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _with_safe_revision(model: str) -> str:
    return f"{model}@{SAFE_REVISIONS[model]}" if model in SAFE_REVISIONS and not Path(model).is_dir() else model


class _Encoder:
    """A model cut off after one layer, with its tokenizer."""

    def __init__(self, directory: Path, layer: int, device: str) -> None:
        self._directory = directory
        from backmerge.generation.loading import device_of

        self._device = device_of(device)
        self._tokenizer, model = _load(directory)
        self._layer = layer
        self._is_cut = _cut(model, directory, layer)
        self._model = model.to(self._device).eval()
        self._limit = min(MAX_TOKENS, self._tokenizer.model_max_length, _num_positions(model.config))
        self._uncounted = {self._tokenizer.cls_token_id, self._tokenizer.sep_token_id} - {None}

    def tokens(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return each text's token ids, including special ones."""
        is_spaced = any(kind.__name__ in SPACED_TOKENIZERS for kind in type(self._tokenizer).__mro__)
        prepared = [f" {text}" if is_spaced and text else text for text in texts]
        encoded = self._tokenizer(prepared, truncation=True, max_length=self._limit, return_attention_mask=False)
        return dict(zip(texts, encoded["input_ids"], strict=True))

    def embeddings(self, batch: Sequence[list[int]]) -> list[Embedding]:
        """Return each text's embedding, on the model's device."""
        import torch

        if not batch:
            return []
        width = max(1, *(len(tokens) for tokens in batch))
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*tokens, *[padding] * (width - len(tokens))] for tokens in batch], device=self._device)
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in batch], device=self._device)
        with torch.inference_mode():
            output = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=not self._is_cut)
            hidden = output.last_hidden_state if self._is_cut else output.hidden_states[self._layer]
            vectors = (hidden / hidden.norm(dim=-1, keepdim=True)).cpu()
        return [self._embedding(row[: len(tokens)], tokens) for row, tokens in zip(vectors, batch, strict=True)]

    def _embedding(self, vectors: Tensor, tokens: Sequence[int]) -> Embedding:
        import torch

        if not vectors.isfinite().all():
            raise CheckpointError(
                f"the encoder in {self._directory} gives numbers that are not finite, so there is no BERTScore",
                remedy="its weights may be damaged: download them again.",
            )
        counts = torch.tensor([token not in self._uncounted for token in tokens], dtype=torch.bool)
        # a copy, so that a short text does not keep its whole batch in memory
        return Embedding(vectors.clone(), counts)


def _load(directory: Path) -> tuple[Any, Any]:
    """Load tokenizer and model, in float32."""
    import torch
    import transformers

    from backmerge.generation.chat import load_tokenizer
    from backmerge.generation.loading import load_filled

    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"the encoder for BERTScore in {directory} cannot be loaded: it has no safetensors",
            remedy="give a folder with config.json, a tokenizer and safetensors; a pickle (pytorch_model.bin) is not "
            f"read, but many repositories have safetensors in a branch, such as {DEFAULT_MODEL}@refs/pr/6.",
        )
    tokenizer = load_tokenizer(directory, needs_template=False)
    # the pooler is not part of the layers; other weights of an encoder, such as a classifier, are not needed
    model = load_filled(
        transformers.AutoModel,
        directory,
        ignored_missing=re.compile(r"(^|\.)pooler\."),
        ignored_extra=re.compile(""),
        dtype=torch.float32,
    )
    if model.config.is_encoder_decoder:
        raise CheckpointError(
            f"{directory} has a model with encoder and decoder",
            remedy="BERTScore needs an encoder only.",
        )
    return tokenizer, model


def _cut(model: Any, directory: Path, layer: int) -> bool:
    """Remove the layers that are not needed, if the model's form is known.

    Returns:
        Whether the model's last hidden state is now that of the layer.
    """
    depth = model.config.num_hidden_layers
    if not 0 <= layer <= depth:
        raise ConfigError(
            f"the encoder in {directory} has no layer {layer}: it has {depth} layers",
            remedy=f"give a `layer` from 0 (the input embeddings) to {depth}.",
        )
    for name in ("encoder.layer", "transformer.layer"):
        try:
            layers = model.get_submodule(name)
        except AttributeError:
            continue
        # some (DeBERTa-v2) need at least one layer
        del layers[max(layer, 1) :]
        return layer > 0
    return False


def _num_positions(config: Any) -> int:
    """Return the longest text, in tokens, that the position embeddings have room for."""
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    # RoBERTa and related models count positions from after the padding's id
    is_offset = "roberta" in config.model_type or config.model_type in {"camembert", "longformer", "mpnet"}
    return positions - (config.pad_token_id + 1 if is_offset else 0) if positions > 0 else MAX_TOKENS
