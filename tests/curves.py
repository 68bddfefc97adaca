"""A tiny training run to be started in many ways, and how two of its curves are held against each other."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.ranks import REPO, run_ranks

STEPS = 20
TINY = """
max_steps: 20
model: {num_layers: 2, d_model: 32, num_heads: 4, num_kv_heads: 2, vocab_size: 50304}
moe: {num_experts: 4, intermediate_size: 16}
data: {seq_len: 32, num_workers: 0}
optim: {warmup_steps: 2, lr: 0.003}
eval: {every: 0, max_tokens: 256, sample_tokens: 0}
telemetry: {every: 1, tensorboard: false, wandb: "off"}
"""
DS_JSON = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}
SEQUENCES_PER_STEP = 8

Curve = list[tuple[float, float]]


class Runs:
    """Command lines and results of runs that share a model, data and the sequences of each step."""

    recipe = "lm_16l"
    tiny = TINY

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "tiny.yaml").write_text(self.tiny)
        (folder / "ds.json").write_text(json.dumps(DS_JSON))

    def argv(
        self, name: str, world_size: int, *, stage: int, ds: tuple[str, ...] = (), extra: tuple[str, ...] = ()
    ) -> list[str]:
        accum = SEQUENCES_PER_STEP // (DS_JSON["train_micro_batch_size_per_gpu"] * world_size)
        return [
            "--config",
            str(self.folder / "tiny.yaml"),
            "--deepspeed_config",
            str(self.folder / "ds.json"),
            "--output_dir",
            str(self.folder / name),
            "--deepspeed_override",
            f"zero_optimization.stage={stage}",
            f"gradient_accumulation_steps={accum}",
            *ds,
            *extra,
        ]

    def train(self, world_size: int, cases: dict[str, list[str]]) -> dict[str, Curve]:
        """Run the command lines; the curve of each name."""
        self.run(world_size, cases)
        return {name: self.curve(name) for name in cases}

    def run(self, world_size: int, cases: dict[str, Any]) -> None:
        """Run the command lines, one after the other in one start; or what else ``train_cases.py`` knows."""
        listed = self.folder / f"cases_{world_size}.json"
        listed.write_text(json.dumps(list(cases.values())))
        worker = str(REPO / "tests" / "distributed" / "train_cases.py")
        run_ranks(world_size, [worker, str(listed), self.recipe], timeout=120 + 15 * len(cases))

    def curve(self, name: str) -> Curve:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
        return [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]


class CharacterRuns(Runs):
    """The same with the characters of a made-up text as vocabulary: half of a run's time would go into GPT-2's."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "tokenizer").mkdir()
        characters = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]  # a blank, a line end, byte-level
        vocab = {character: index for index, character in enumerate(characters)}
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
        (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        write_words(folder / "text.jsonl")

    def argv(
        self, name: str, world_size: int, *, stage: int, ds: tuple[str, ...] = (), extra: tuple[str, ...] = ()
    ) -> list[str]:
        text = ("--data.source", str(self.folder / "text.jsonl"), "--data.tokenizer", str(self.folder / "tokenizer"))
        extra = ("--model.vocab_size", "128", *text, *extra)
        return super().argv(name, world_size, stage=stage, ds=ds, extra=extra)


TINY_TRANSLATION = """
max_steps: 20
model: {num_encoder_layers: 1, num_decoder_layers: 1, d_model: 32, num_heads: 4, vocab_size: 300, dropout: 0.0}
moe: {num_experts: 4, intermediate_size: 16}
data: {batch_tokens: 128, max_len: 40, test_fraction: 0.1}
optim: {warmup_steps: 2, lr: 0.003}
eval: {every: 0, bleu_sentences: 5, test_sentences: 8, beam_size: 3, max_len_ratio: 0.3}
telemetry: {every: 1, tensorboard: false, wandb: "off"}
"""


class TranslationRuns(Runs):
    """Runs of ``translation`` on made-up pairs: numbers in words, in two languages that write them in other orders."""

    recipe = "translation"
    tiny = TINY_TRANSLATION

    def __init__(self, folder: Path):
        super().__init__(folder)
        write_pairs(folder / "pairs.tsv")

    def argv(
        self, name: str, world_size: int, *, stage: int, ds: tuple[str, ...] = (), extra: tuple[str, ...] = ()
    ) -> list[str]:
        data = ("--data.source", str(self.folder / "pairs.tsv"), "--data.cache_dir", str(self.folder / "cache"))
        return super().argv(name, world_size, stage=stage, ds=ds, extra=(*data, *extra))

    def translations(self, name: str) -> list[str]:
        """The lines of a run's test translations."""
        return (self.folder / name / "test_translations.jsonl").read_text().splitlines()


TINY_CLASSIFIER = """
max_steps: 20
model: {input_size: 16, hidden_size: 32, num_experts: 4, num_layers: 2, vocab_size: 400, dropout: 0.0}
data: {batch_examples: 2, max_len: 24, tokenizer: bpe}
optim: {warmup_steps: 2, lr: 0.003}
early_stopping: {metric: ""}
eval: {every: 0}
telemetry: {every: 1, tensorboard: false, wandb: "off"}
"""


class ClassifierRuns(Runs):
    """Runs of ``classifier`` on made-up sentences whose class is the mood that is named first."""

    recipe = "classifier"
    tiny = TINY_CLASSIFIER

    def __init__(self, folder: Path):
        super().__init__(folder)
        write_moods(folder / "moods.csv")

    def argv(
        self, name: str, world_size: int, *, stage: int, ds: tuple[str, ...] = (), extra: tuple[str, ...] = ()
    ) -> list[str]:
        data = ("--data.source", str(self.folder / "moods.csv"), "--data.cache_dir", str(self.folder / "cache"))
        return super().argv(name, world_size, stage=stage, ds=ds, extra=(*data, *extra))

    def predictions(self, name: str) -> list[dict]:
        """What a run made of each test example."""
        return [json.loads(line) for line in (self.folder / name / "predictions.jsonl").read_text().splitlines()]


TINY_SWITCH = """
max_steps: 20
model: {num_layers: 2, d_model: 32, num_heads: 4, vocab_size: 360, dropout: 0.0}
moe: {num_experts: 4, intermediate_size: 16, capacity_factor: 1.0}
data: {seq_len: 32, num_workers: 0}
optim: {warmup_steps: 2, lr: 0.003, schedule: constant}
eval: {every: 0, max_tokens: 256, sample_tokens: 0}
telemetry: {every: 1, tensorboard: false, wandb: "off"}
"""


class SwitchRuns(Runs):
    """Runs of ``switch`` on the bytes of made-up sentences."""

    recipe = "switch"
    tiny = TINY_SWITCH

    def __init__(self, folder: Path):
        super().__init__(folder)
        write_words(folder / "text.jsonl")

    def argv(
        self, name: str, world_size: int, *, stage: int, ds: tuple[str, ...] = (), extra: tuple[str, ...] = ()
    ) -> list[str]:
        data = ("--data.source", str(self.folder / "text.jsonl"), "--data.cache_dir", str(self.folder / "cache"))
        return super().argv(name, world_size, stage=stage, ds=ds, extra=(*data, *extra))


def write_words(path: Path, count: int = 300) -> None:
    """A JSONL file of texts of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 6))) for _ in range(50)]
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=60))}) + "\n" for _ in range(count)))


def write_moods(path: Path, count: int = 400) -> None:
    """A CSV file of sentences with a good and a bad word each; the one that comes first is the class."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 6))) for _ in range(50)]
    lines = []
    for _ in range(count):
        label, sentence = draw.randrange(2), draw.choices(words, k=draw.randint(2, 8))
        moods = ("sad", "glad") if label == 0 else ("glad", "sad")
        first = draw.randint(0, len(sentence))
        sentence[first:first] = [moods[0]]
        sentence.insert(draw.randint(first + 1, len(sentence)), moods[1])
        lines.append(f"{' '.join(sentence)},{label}\n")
    path.write_text("text,label\n" + "".join(lines))


def write_pairs(path: Path, count: int = 400) -> None:
    """A TSV file of pairs of English and a German that says the last digit first."""
    english = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    german = ["null", "eins", "zwei", "drei", "vier", "sechs", "sieben", "acht", "neun", "zehn"]
    draw = random.Random(0)
    numbers = [[draw.randrange(10) for _ in range(draw.randint(1, 6))] for _ in range(count)]
    lines = [f"{' '.join(english[d] for d in n)}\t{' '.join(german[d] for d in reversed(n))}\n" for n in numbers]
    path.write_text("en\tde\n" + "".join(lines))


def assert_same(curves: dict[str, Curve], expected: Curve, loss: float = 1e-5, grad_norm: float = 1e-4) -> None:
    """Every loss within ``loss`` of the expected one, every gradient norm within ``grad_norm`` of it, relatively."""
    wrong = {}
    for name, curve in curves.items():
        pairs = list(zip(curve, expected, strict=True))
        losses = max(abs(mine[0] - other[0]) for mine, other in pairs)
        norms = max(abs(mine[1] / other[1] - 1) for mine, other in pairs)
        if not (losses <= loss and norms <= grad_norm):
            wrong[name] = (losses, norms)
    assert not wrong, f"largest difference of the loss, largest relative difference of the gradient norm: {wrong}"
