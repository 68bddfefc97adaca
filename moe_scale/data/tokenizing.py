"""Tokenize documents in worker processes, in order. Imports no torch, so that workers start quickly.

Shape suffixes: T tokens.
"""

from __future__ import annotations

import collections
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from moe_scale.data.tokenizer import TextTokenizer
from moe_scale.errors import ConfigError, Problem

_PENDING_PER_WORKER = 3


def encode_documents(tokenizer: TextTokenizer, texts: list[str], *, threads: bool = False) -> list[np.ndarray]:
    """Each text as its end-of-text token followed by its tokens, [T] int64 each.

    Args:
        threads: encode with the tokenizer's own threads. Only for a process that never forks afterwards: the
            threads would be lost in its children.
    """
    encoded = tokenizer.encode_batch(texts) if threads else map(tokenizer.encode, texts)
    documents = []
    for ids in encoded:
        ids_T = np.asarray([tokenizer.eot_id, *ids], dtype=np.int64)
        keep_T = ids_T != tokenizer.eot_id
        keep_T[0] = True  # end-of-text marks the start of a document and nothing else
        documents.append(ids_T if keep_T.all() else ids_T[keep_T])
    return documents


def tokenize(
    tokenizer: TextTokenizer, chunks: Iterable[list[str]], dtype: str, num_workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokenize chunks of documents in ``num_workers`` processes (0: in this one); results keep the order of chunks.

    Only a few chunks per worker are in flight, so memory stays small however large the source is.

    Yields:
        For each chunk the tokens of all its documents, [T] of ``dtype``, and each document's number of tokens.

    Raises:
        ConfigError: at ``data.num_workers``, when a worker process dies.
    """
    if not num_workers:
        for chunk in chunks:
            yield _encode_chunk(tokenizer, dtype, chunk)
        return
    # spawn, not fork: by now the parent may hold threads and a GPU, which do not survive a fork.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer, dtype))
    pending: collections.deque[Future] = collections.deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) > _PENDING_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            Problem(
                "data.num_workers",
                f"a tokenizing process died ({error})",
                "the usual causes are too little memory, and a script without `if __name__ == '__main__':`; "
                "0 tokenizes in this process",
                this_host_only=True,
            )
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[TextTokenizer, str] | None = None
"""What a worker process was started with: sent once, not with every chunk."""


def _start_worker(tokenizer: TextTokenizer, dtype: str) -> None:
    global _worker
    _worker = (tokenizer, dtype)


def _encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    assert _worker is not None
    return _encode_chunk(*_worker, texts)


def _encode_chunk(tokenizer: TextTokenizer, dtype: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    documents = encode_documents(tokenizer, texts)
    lengths = np.asarray([len(d) for d in documents], dtype=np.int64)
    return np.concatenate(documents).astype(dtype), lengths
