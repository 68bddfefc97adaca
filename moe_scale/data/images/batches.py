"""Images and texts as padded batches, for training and evaluation.

    data = prepare_image_text(config.data, config.model.vocab_size)
    loader = train_loader(data, config.data, micro_batch=8, rank=0, world_size=1, seed=1234)
    batch = next(loader)

Shape suffixes: B batch, C colours, H height, W width, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.augment import middle_view, normalized, sample_random, training_view
from moe_scale.data.images.decode import UnreadableImageError
from moe_scale.data.images.prepare import PreparedImageText
from moe_scale.data.images.split_files import ImageTextSplit
from moe_scale.data.packing import IGNORE
from moe_scale.data.report import SkipReport
from moe_scale.data.subwords import PAD_ID

NO_ITEM = -1
"""Item of a row that only fills a batch."""


class ImageTextBatch(NamedTuple):
    """Images and a text of each, or texts alone.

    Attributes:
        images_BCHW: float32, red, green and blue after ``data.mean`` and ``data.std``; None for texts alone (GLUE).
        ids_BS: token ids, int64; the first of each row is CLS, padding on the right is 0.
        valid_BS: bool, False for padding.
        segments_BS: int64, 0 up to the end of the first text of a pair and 1 from there; None without pairs.
        labels_B: class, int64, -100 for none; or a score, float32, NaN for none; None for retrieval.
        items_B: int64, number of the image (of the example, for texts alone): all texts of an image share it, so each
            of them is a right answer to it; -1 where there is none.
        present_B: bool, False for a row that only fills the batch, or whose image cannot be read. Such a row has an
            image of zeros and CLS alone as text; it has to be left out of losses, negatives and scores.
    """

    images_BCHW: torch.Tensor | None
    ids_BS: torch.Tensor
    valid_BS: torch.Tensor
    segments_BS: torch.Tensor | None
    labels_B: torch.Tensor | None
    items_B: torch.Tensor
    present_B: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageTextBatch:
        """The batch on ``device``."""
        moved: list[Any] = [None if one is None else one.to(device, non_blocking=non_blocking) for one in self]
        return ImageTextBatch(*moved)


def make_batch(
    data: PreparedImageText,
    split: ImageTextSplit,
    texts: Sequence[int],
    config: ImageTextDataConfig,
    *,
    report: SkipReport,
    samples: Sequence[int] | None = None,
    seed: int = 0,
) -> ImageTextBatch:
    """The batch of these texts of a split with their images, as wide as the longest of them.

    Args:
        texts: -1 stands for a row that only fills the batch.
        report: told of images that cannot be read.
        samples: number of each row in the global order of training, which its augmentation is a function of; None for
            evaluation, which takes the middle of each image.
        seed: of the augmentation.
    """
    views, rows = None, list(texts)
    if data.images is not None:
        views = []
        for place, text in enumerate(rows):
            sample = None if samples is None else samples[place]
            view = _view(data, split, text, config, report, sample, seed) if text >= 0 else None
            if view is None:
                rows[place] = NO_ITEM
                view = np.zeros((config.image_size, config.image_size, 3), dtype=np.uint8)
            views.append(view)
    present_B = torch.tensor([text >= 0 for text in rows])
    images_BCHW = None
    if views is not None:
        images_BCHW = torch.from_numpy(normalized(views, config))
        images_BCHW[~present_B] = 0
    ids_BS, valid_BS, segments_BS = _tokens(data, split, rows)
    return ImageTextBatch(
        images_BCHW,
        ids_BS,
        valid_BS,
        segments_BS if config.is_glue and bool((split.second_T > 0).any()) else None,
        _labels(split, rows, config),
        torch.tensor([int(split.items_T[text]) if text >= 0 else NO_ITEM for text in rows]),
        present_B,
    )


def _view(
    data: PreparedImageText,
    split: ImageTextSplit,
    text: int,
    config: ImageTextDataConfig,
    report: SkipReport,
    sample: int | None,
    seed: int,
) -> np.ndarray | None:
    """What is seen of a text's image; None, and counted, where it cannot be read."""
    assert data.images is not None
    item = int(split.items_T[text])
    image = int(split.images_M[item])
    try:
        pixels_HWC = data.images.read(image)
    except UnreadableImageError as error:
        report.skip(error.reason, data.images.name(image), error.detail)
        return None
    if sample is None:
        return middle_view(pixels_HWC, config.image_size)
    return training_view(pixels_HWC, config, sample_random(seed, sample), mirrors=bool(split.mirrors_M[item]))


def _tokens(
    data: PreparedImageText, split: ImageTextSplit, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, whether they are any, and which text of a pair they belong to; each [B, S]."""
    alone = np.array([data.vocabulary.bos_id])
    tokens = [split.tokens(text) if text >= 0 else alone for text in rows]
    shape = (len(rows), max(map(len, tokens)))
    ids_BS, segments_BS = np.full(shape, PAD_ID, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    valid_BS = np.zeros(shape, dtype=bool)
    for place, (text, own) in enumerate(zip(rows, tokens, strict=True)):
        ids_BS[place, : len(own)] = own
        valid_BS[place, : len(own)] = True
        if text >= 0 and split.second_T[text]:
            segments_BS[place, split.second_T[text] : len(own)] = 1
    return torch.from_numpy(ids_BS), torch.from_numpy(valid_BS), torch.from_numpy(segments_BS)


def _labels(split: ImageTextSplit, rows: Sequence[int], config: ImageTextDataConfig) -> torch.Tensor | None:
    labels = [float(split.labels_T[text]) if text >= 0 else math.nan for text in rows]
    if config.goal == "retrieval":
        return None
    if config.goal == "regression":
        return torch.tensor(labels, dtype=torch.float32)
    return torch.tensor([IGNORE if math.isnan(label) else int(label) for label in labels])


def eval_batches(
    data: PreparedImageText,
    split: ImageTextSplit,
    config: ImageTextDataConfig,
    *,
    batch: int,
    rank: int,
    world_size: int,
    limit: int = 0,
    report: SkipReport | None = None,
) -> Iterator[ImageTextBatch]:
    """All texts of a split with their images, in their order: for classes and scores.

    Every rank gets the same number of batches of the same number of rows, because the forward pass of a sharded model
    is collective: rows without a text have ``present_B`` False.

    Args:
        limit: texts at most, the first ones; 0 means all.
        report: told of images that cannot be read.
    """
    texts = np.arange(min(limit or split.num_texts, split.num_texts))
    yield from _even_batches(data, split, texts, config, batch, rank, world_size, report)


def eval_items(
    data: PreparedImageText,
    split: ImageTextSplit,
    config: ImageTextDataConfig,
    *,
    language: str,
    batch: int,
    rank: int,
    world_size: int,
    captions: int = 1,
    limit: int = 0,
    report: SkipReport | None = None,
) -> Iterator[ImageTextBatch]:
    """The images of a split with their captions in one language, for retrieval; as many batches on every rank.

    An image with several captions has a row for each of them, with one ``items_B``.

    Args:
        captions: of an image, at most; 0 means all.
        limit: images at most, the first ones; 0 means all.
        report: told of images that cannot be read.
    """
    of_language = np.flatnonzero(split.languages_T == data.languages.index(language))
    items = split.items_T[of_language]
    if captions:  # texts of an item follow one another: how many of the language came before, of the same item
        firsts = np.searchsorted(items, items, side="left")
        chosen = np.arange(len(items)) - firsts < captions
        of_language, items = of_language[chosen], items[chosen]
    if limit:
        of_language = of_language[np.searchsorted(np.unique(items), items) < limit]
    yield from _even_batches(data, split, of_language, config, batch, rank, world_size, report)


def eval_languages(data: PreparedImageText, split: ImageTextSplit) -> dict[str, bool]:
    """The languages that a split has captions in, and whether they were trained on; those come first."""
    present = [data.languages[number] for number in np.unique(split.languages_T)]
    unseen = set(data.config.unseen)
    return {code: code not in unseen for code in sorted(present, key=lambda code: (code in unseen, code))}


def _even_batches(
    data: PreparedImageText,
    split: ImageTextSplit,
    texts: np.ndarray,
    config: ImageTextDataConfig,
    batch: int,
    rank: int,
    world_size: int,
    report: SkipReport | None,
) -> Iterator[ImageTextBatch]:
    total = math.ceil(len(texts) / (batch * world_size)) * batch * world_size
    padded = np.concatenate([texts, np.full(total - len(texts), NO_ITEM, dtype=np.int64)])
    report = report if report is not None else SkipReport()
    for first in range(rank * batch, total, batch * world_size):
        yield make_batch(data, split, padded[first : first + batch].tolist(), config, report=report)
